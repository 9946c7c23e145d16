# SPDX-License-Identifier: Apache-2.0
# Run by ctest: NM, OBJECT. The object of tools/device/cuda.cu shares the namespace of the tool's other objects, and the linker keeps one
# definition of each function that several of them have. Most are the same whoever compiled them. Not so the CPU's kernels, whose rounding
# is the host compiler's alone (core/config.hpp), nor what Eigen allocates or computes, which depends on the processor that was asked for: it
# may define none of these.
execute_process(COMMAND ${NM} --defined-only ${OBJECT} OUTPUT_VARIABLE symbols RESULT_VARIABLE code)
if(NOT code EQUAL 0 OR NOT symbols MATCHES "merge_on_cuda")
    message(FATAL_ERROR "${NM} does not list the merges of ${OBJECT}")
endif()
string(REGEX MATCHALL "_ZNK?(7taskvec[0-9]+v[0-9a-z_]+7kernels|5Eigen[^\n]*(aligned_|handmade_|DenseStorage|PlainObjectBase|assign))[^\n]*" found "${symbols}")
if(found)
    string(REPLACE ";" "\n" found "${found}")
    message(FATAL_ERROR "${OBJECT} defines what belongs to the host compiler:\n${found}")
endif()
