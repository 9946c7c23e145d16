# SPDX-License-Identifier: Apache-2.0
# Run by cpack between installing and packing: what Debian's policy asks for in a package, besides what is installed anywhere.
if(NOT CPACK_GENERATOR STREQUAL "DEB")
    return()
endif()
find_program(gzip gzip REQUIRED)
string(TIMESTAMP date "%a, %d %b %Y %H:%M:%S +0000" UTC) # SOURCE_DATE_EPOCH where it is set
foreach(component IN LISTS CPACK_COMPONENTS_ALL)
    string(TOUPPER ${component} upper)
    set(package ${CPACK_DEBIAN_${upper}_PACKAGE_NAME})
    set(usr ${CPACK_TEMPORARY_DIRECTORY}/${component}/usr)
    file(REMOVE_RECURSE ${usr}/share/doc)
    set(doc ${usr}/share/doc/${package})
    file(WRITE ${doc}/copyright "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: taskvec

Files: *
Copyright: 2026 The taskvec developers
License: Apache-2.0
 On Debian systems the text of the Apache License, Version 2.0, is in
 /usr/share/common-licenses/Apache-2.0.
")
    file(WRITE ${doc}/changelog "${package} (${CPACK_PACKAGE_VERSION}) unstable; urgency=medium

  * Release ${CPACK_PACKAGE_VERSION}.

 -- ${CPACK_PACKAGE_CONTACT}  ${date}
")
    file(GLOB compressed ${usr}/share/man/man1/*.1)
    execute_process(COMMAND ${gzip} -9 -n ${doc}/changelog ${compressed} COMMAND_ERROR_IS_FATAL ANY)
    file(GLOB_RECURSE files ${usr}/share/doc/* ${usr}/share/man/*)
    file(CHMOD ${files} PERMISSIONS OWNER_READ OWNER_WRITE GROUP_READ WORLD_READ)
    file(CHMOD ${usr}/share ${usr}/share/doc ${doc} PERMISSIONS
        OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)
endforeach()
