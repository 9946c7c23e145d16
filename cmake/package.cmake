# SPDX-License-Identifier: Apache-2.0
# CPack: `cpack --config build/release/CPackConfig.cmake -G DEB` (or TGZ). Two packages: taskvec, the tool, and libtaskvec-dev, the
# headers. Build for others without TASKVEC_NATIVE.
set(TASKVEC_MAINTAINER "taskvec developers <taskvec@example.org>" CACHE STRING "Maintainer of packages: NAME <ADDRESS>")
mark_as_advanced(TASKVEC_MAINTAINER)

set(CPACK_PACKAGE_NAME taskvec)
set(CPACK_PACKAGE_VENDOR "taskvec developers")
set(CPACK_PACKAGE_CONTACT ${TASKVEC_MAINTAINER})
set(CPACK_PACKAGE_CHECKSUM SHA256)
set(CPACK_RESOURCE_FILE_LICENSE ${PROJECT_SOURCE_DIR}/LICENSE)
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
set(CPACK_COMPONENTS_ALL headers)
if(TARGET taskvec-tool)
    list(APPEND CPACK_COMPONENTS_ALL tool)
endif()

set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
# What Debian's policy asks for in every package: compressed manual pages, a copyright and a changelog.
set(CPACK_PRE_BUILD_SCRIPTS ${PROJECT_SOURCE_DIR}/cmake/debian_files.cmake)
set(CPACK_TASKVEC_LICENSE ${PROJECT_SOURCE_DIR}/LICENSE)

set(CPACK_DEBIAN_TOOL_PACKAGE_NAME taskvec)
set(CPACK_DEBIAN_TOOL_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_TOOL_DESCRIPTION "merge, prune and reuse fine-tuned models
Works on safetensors checkpoints and LoRA adapters: task arithmetic, TIES
and other merges, exact selection of the largest changes, low-rank
decompositions, and mergekit configurations. Results are the same bits for
any number of threads, and memory stays within a budget.")
set(CPACK_DEBIAN_TOOL_PACKAGE_SUGGESTS gnuplot-nox)

set(CPACK_DEBIAN_HEADERS_PACKAGE_NAME libtaskvec-dev)
set(CPACK_DEBIAN_HEADERS_PACKAGE_ARCHITECTURE all)
set(CPACK_DEBIAN_HEADERS_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_HEADERS_PACKAGE_DEPENDS "libeigen3-dev (>= 3.4)")
set(CPACK_DEBIAN_HEADERS_PACKAGE_RECOMMENDS "nlohmann-json3-dev (>= 3.10)")
set(CPACK_DEBIAN_HEADERS_DESCRIPTION "C++20 headers for reusing fine-tuned models
Header-only algorithms: task-vector arithmetic, TIES and other merges,
exact top-m% selection by magnitude, low-rank decompositions, linearized
LoRA, and safetensors files. Comes with CMake and pkg-config files.")
include(CPack)
