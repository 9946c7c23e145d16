# SPDX-License-Identifier: Apache-2.0
# The version has one source, include/taskvec/core/config.hpp; this reads it.

function(taskvec_read_version result)
    set(parts)
    foreach(part IN ITEMS MAJOR MINOR PATCH)
        file(STRINGS ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../include/taskvec/core/config.hpp line
            REGEX "^#define TASKVEC_VERSION_${part} [0-9]+$")
        if(NOT line MATCHES "([0-9]+)$")
            message(FATAL_ERROR "taskvec: include/taskvec/core/config.hpp does not define TASKVEC_VERSION_${part}")
        endif()
        list(APPEND parts ${CMAKE_MATCH_1})
    endforeach()
    list(JOIN parts . version)
    set(${result} ${version} PARENT_SCOPE)
endfunction()
