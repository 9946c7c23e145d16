# SPDX-License-Identifier: Apache-2.0
# Installs the headers and a package file: find_package(taskvec [COMPONENTS core io cuda]).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

# The library has no machine code, so its package file lives in share/.
set(taskvec_config_dir ${CMAKE_INSTALL_DATADIR}/cmake/taskvec)

install(TARGETS taskvec_core EXPORT taskvec-coreTargets FILE_SET HEADERS DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT headers)
install(EXPORT taskvec-coreTargets NAMESPACE taskvec:: DESTINATION ${taskvec_config_dir} COMPONENT headers)
if(NOT TASKVEC_CORE_ONLY)
    install(TARGETS taskvec EXPORT taskvecTargets)
    install(EXPORT taskvecTargets NAMESPACE taskvec:: DESTINATION ${taskvec_config_dir} COMPONENT headers)
    install(TARGETS taskvec_io EXPORT taskvec-ioTargets)
    install(EXPORT taskvec-ioTargets NAMESPACE taskvec:: DESTINATION ${taskvec_config_dir} COMPONENT headers)
    install(TARGETS taskvec_cuda EXPORT taskvec-cudaTargets)
    install(EXPORT taskvec-cudaTargets NAMESPACE taskvec:: DESTINATION ${taskvec_config_dir} COMPONENT headers)
endif()

configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/taskvecConfig.cmake.in ${PROJECT_BINARY_DIR}/taskvecConfig.cmake
    INSTALL_DESTINATION ${taskvec_config_dir} NO_SET_AND_CHECK_MACRO)
# Version ranges are of one minor version too: find_package(taskvec 0.2.1...<0.3).
write_basic_package_version_file(${PROJECT_BINARY_DIR}/taskvecConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/taskvecConfig.cmake ${PROJECT_BINARY_DIR}/taskvecConfigVersion.cmake ${PROJECT_SOURCE_DIR}/cmake/cuda.cmake
    DESTINATION ${taskvec_config_dir} COMPONENT headers)
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR} COMPONENT headers)

# pkg-config: taskvec-core, taskvec, taskvec-io. What they need stands in Requires; C++20 is the user's to ask for.
function(taskvec_install_pc name description requires cflags libs)
    set(pc_name ${name})
    set(pc_description ${description})
    set(pc_requires "${requires}")
    set(pc_cflags "${cflags}")
    set(pc_libs "${libs}")
    # Found from where the file lies, so that the installation may be moved.
    file(RELATIVE_PATH pc_prefix /p/${CMAKE_INSTALL_DATADIR}/pkgconfig /p)
    string(REGEX REPLACE "/$" "" pc_prefix ${pc_prefix})
    configure_file(${PROJECT_SOURCE_DIR}/cmake/taskvec.pc.in ${PROJECT_BINARY_DIR}/${name}.pc @ONLY)
    install(FILES ${PROJECT_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig COMPONENT headers)
endfunction()
taskvec_install_pc(taskvec-core "Merges of fine-tuned models and selection by magnitude, by the standard library alone"
    "" "-I\${includedir} -pthread" "-pthread")
if(NOT TASKVEC_CORE_ONLY)
    taskvec_install_pc(taskvec "${PROJECT_DESCRIPTION}" "taskvec-core = ${PROJECT_VERSION}, eigen3 >= 3.4" "" "")
    taskvec_install_pc(taskvec-io "taskvec, and the files of models and adapters"
        "taskvec = ${PROJECT_VERSION}, nlohmann_json >= 3.10" "" "")
endif()
