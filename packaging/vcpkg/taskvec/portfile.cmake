# SPDX-License-Identifier: Apache-2.0
# An overlay port that packages the checkout it lies in. After its first lines it is packaging/vcpkg_release's, of a release.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release) # header-only: one configuration is enough

vcpkg_cmake_configure(
    SOURCE_PATH "${SOURCE_PATH}"
    OPTIONS
        -DTASKVEC_INSTALL=ON
        -DTASKVEC_BUILD_TOOLS=OFF
        -DTASKVEC_BUILD_TESTS=OFF
        -DTASKVEC_BUILD_EXAMPLES=OFF
        -DTASKVEC_BUILD_BENCHMARKS=OFF
        -DTASKVEC_CUDA=OFF
)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/taskvec)
vcpkg_fixup_pkgconfig()
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
