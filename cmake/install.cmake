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
write_basic_package_version_file(${PROJECT_BINARY_DIR}/taskvecConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/taskvecConfig.cmake ${PROJECT_BINARY_DIR}/taskvecConfigVersion.cmake ${PROJECT_SOURCE_DIR}/cmake/cuda.cmake
    DESTINATION ${taskvec_config_dir} COMPONENT headers)
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR} COMPONENT headers)
