# SPDX-License-Identifier: Apache-2.0
#
# taskvec_header_needs(<header> <result>): which optional packages a header of taskvec needs, itself or through the headers
# of taskvec that it includes. The result is a list of eigen, json, xtensor, nlopt, thrust, cuda; empty for most.

set(TASKVEC_PACKAGE_INCLUDES
    "eigen:Eigen/" "json:nlohmann/" "xtensor:xtensor/|xtl/" "nlopt:nlopt" "thrust:thrust/" "cuda:cuda|cub/|cusolver|cublas|curand" "hip:hip/" "dlpack:dlpack/")

function(taskvec_header_needs header result)
    get_property(seen GLOBAL PROPERTY taskvec_needs_of_${header} SET)
    if(NOT seen)
        set_property(GLOBAL PROPERTY taskvec_needs_of_${header} "")
        set(needs)
        file(STRINGS ${header} lines REGEX "^ *# *include *[<\"]")
        foreach(line IN LISTS lines)
            string(REGEX REPLACE "^ *# *include *[<\"]([^>\"]*)[>\"].*" "\\1" included "${line}")
            if(included MATCHES "^taskvec/")
                set(path ${taskvec_include_dir}/${included})
                if(NOT EXISTS ${path})
                    message(FATAL_ERROR "${header} includes <${included}>, which does not exist")
                endif()
                taskvec_header_needs(${path} inner)
                list(APPEND needs ${inner})
            else()
                foreach(row IN LISTS TASKVEC_PACKAGE_INCLUDES)
                    string(REGEX REPLACE ":.*" "" package ${row})
                    string(REGEX REPLACE "^[^:]*:" "" starts ${row})
                    if(included MATCHES "^(${starts})") # overwrites CMAKE_MATCH_1: the row is taken apart before
                        list(APPEND needs ${package})
                    endif()
                endforeach()
            endif()
        endforeach()
        list(REMOVE_DUPLICATES needs)
        set_property(GLOBAL PROPERTY taskvec_needs_of_${header} "${needs}")
    endif()
    get_property(needs GLOBAL PROPERTY taskvec_needs_of_${header})
    set(${result} "${needs}" PARENT_SCOPE)
endfunction()
