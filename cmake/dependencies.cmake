# SPDX-License-Identifier: Apache-2.0
# Looks up what taskvec is built on. Nothing is downloaded unless TASKVEC_FETCH_DEPS is on.

macro(_taskvec_fetch name target repository tag)
    include(FetchContent)
    FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON)
    FetchContent_GetProperties(${name})
    if(NOT ${name}_POPULATED)
        FetchContent_Populate(${name})
    endif()
endmacro()

# Eigen3::Eigen, 3.4 or later. Eigen 5's package file refuses a request for 3.4, so the version is checked afterwards.
macro(taskvec_find_eigen)
    if(NOT TARGET Eigen3::Eigen)
        find_package(Eigen3 CONFIG QUIET)
    endif()
    if(NOT TARGET Eigen3::Eigen AND TASKVEC_FETCH_DEPS)
        # Only the headers: Eigen's own CMake project would add its tests and its global options.
        _taskvec_fetch(eigen Eigen3::Eigen https://gitlab.com/libeigen/eigen.git 3.4.0)
        add_library(taskvec_fetched_eigen INTERFACE)
        add_library(Eigen3::Eigen ALIAS taskvec_fetched_eigen)
        target_include_directories(taskvec_fetched_eigen SYSTEM INTERFACE $<BUILD_INTERFACE:${eigen_SOURCE_DIR}>)
        set(TASKVEC_INSTALL OFF)
    endif()
    if(NOT TARGET Eigen3::Eigen)
        message(FATAL_ERROR "taskvec: Eigen was not found. Install it (Debian: libeigen3-dev), point CMAKE_PREFIX_PATH to it, "
            "or set TASKVEC_FETCH_DEPS=ON to download it.")
    endif()
    if(DEFINED Eigen3_VERSION AND Eigen3_VERSION VERSION_LESS 3.4)
        message(FATAL_ERROR "taskvec: found Eigen ${Eigen3_VERSION} in ${Eigen3_DIR}; 3.4 or later is needed")
    endif()
endmacro()

# nlohmann_json::nlohmann_json, for taskvec::io. Its absence is an error only for those who link taskvec::io.
macro(taskvec_find_json)
    if(NOT TARGET nlohmann_json::nlohmann_json)
        find_package(nlohmann_json 3.10 CONFIG QUIET)
    endif()
    if(NOT TARGET nlohmann_json::nlohmann_json AND TASKVEC_FETCH_DEPS)
        _taskvec_fetch(json nlohmann_json::nlohmann_json https://github.com/nlohmann/json.git v3.11.2)
        add_library(taskvec_fetched_json INTERFACE)
        add_library(nlohmann_json::nlohmann_json ALIAS taskvec_fetched_json)
        target_include_directories(taskvec_fetched_json SYSTEM INTERFACE $<BUILD_INTERFACE:${json_SOURCE_DIR}/include>)
        set(TASKVEC_INSTALL OFF)
    endif()
endmacro()
