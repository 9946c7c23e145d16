# SPDX-License-Identifier: Apache-2.0
# Run by ctest: COMPILER, SOURCE, INCLUDES. See CMakeLists.txt beside this file.
set(command ${COMPILER} -std=c++20 -fsyntax-only)
# Not -isystem: a folder that the compiler searches by itself, such as /usr/include, is left where it is if -I names it;
# -isystem would put it before the standard library's own, whose #include_next then finds nothing.
foreach(folder IN LISTS INCLUDES)
    list(APPEND command -I ${folder})
endforeach()

file(STRINGS ${SOURCE} expected REGEX "^// error: ")
string(REGEX REPLACE "^// error: " "" expected "${expected}")
if(NOT expected)
    message(FATAL_ERROR "${SOURCE} has no line '// error: <regular expression>'")
endif()

file(STRINGS ${SOURCE} most_lines REGEX "^// lines: ")
string(REGEX REPLACE "^// lines: " "" most_lines "${most_lines}")

execute_process(COMMAND ${command} ${SOURCE} RESULT_VARIABLE code ERROR_VARIABLE output)
if(NOT code EQUAL 0)
    message(FATAL_ERROR "without TASKVEC_FAULT it should compile:\n${output}")
endif()
execute_process(COMMAND ${command} -DTASKVEC_FAULT ${SOURCE} RESULT_VARIABLE code ERROR_VARIABLE output)
if(code EQUAL 0)
    message(FATAL_ERROR "with TASKVEC_FAULT it should not compile, and did")
endif()
if(NOT output MATCHES "${expected}")
    message(FATAL_ERROR "the compiler did not say '${expected}':\n${output}")
endif()
string(REGEX MATCHALL "\n" lines "${output}")
list(LENGTH lines lines)
if(most_lines AND lines GREATER most_lines)
    message(FATAL_ERROR "the compiler took ${lines} lines to say it, more than ${most_lines}:\n${output}")
endif()
