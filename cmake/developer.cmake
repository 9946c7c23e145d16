# SPDX-License-Identifier: Apache-2.0
# Flags of taskvec's own programs (tests, tool, examples, benchmarks). None of this reaches a project that uses taskvec.

add_library(taskvec_developer INTERFACE)
target_compile_options(taskvec_developer INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;$<$<BOOL:${TASKVEC_WERROR}>:-Werror>>")
# g++ 12 at -O2 and above takes "text" + std::string(…) for an overlapping copy (GCC bug 105651).
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(taskvec_developer INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
# Elementwise results are the same bits for any processor; only the time differs.
if(TASKVEC_NATIVE)
    target_compile_options(taskvec_developer INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-march=native>)
    # g++ 12 finds its own AVX-512 intrinsics uninitialized wherever Eigen uses them (GCC bug 105593).
    if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
        target_compile_options(taskvec_developer INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-uninitialized;-Wno-maybe-uninitialized>)
    endif()
endif()

if(TASKVEC_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    find_program(TASKVEC_CCACHE_PROGRAM ccache)
    if(TASKVEC_CCACHE_PROGRAM)
        set(CMAKE_CXX_COMPILER_LAUNCHER ${TASKVEC_CCACHE_PROGRAM})
    endif()
endif()

# A program of the project: add_executable with the house's flags.
function(taskvec_add_program name)
    add_executable(${name} ${ARGN})
    target_link_libraries(${name} PRIVATE taskvec::taskvec taskvec_developer)
    set_target_properties(${name} PROPERTIES CXX_EXTENSIONS OFF)
endfunction()

# What the release preset builds: the tool and the examples.
add_custom_target(programs)
# The reference, in docs/html of the build folder: scripts/site.
add_custom_target(docs COMMAND ${PROJECT_SOURCE_DIR}/scripts/site ${PROJECT_BINARY_DIR}/docs USES_TERMINAL VERBATIM)
# What scripts/gpu-check builds: the gpu tests and benchmarks.
add_custom_target(gpu_checks)
