# SPDX-License-Identifier: Apache-2.0
# For 64-bit Windows, by Debian's g++-mingw-w64-x86-64-posix; programs that the build runs, tests among them, run under wine:
#
#     cmake -B build/windows -G Ninja -D CMAKE_TOOLCHAIN_FILE=cmake/toolchains/x86_64-w64-mingw32.cmake -D TASKVEC_CROSS_ROOT=FOLDER
#
# FOLDER holds the headers of other projects alone (usr/include of the packages libeigen3-dev and so on, unpacked by dpkg -x):
# /usr/include has this machine's C library, too. scripts/check-cross makes one.
set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR AMD64)
set(CMAKE_CXX_COMPILER x86_64-w64-mingw32-g++-posix)
set(CMAKE_RC_COMPILER x86_64-w64-mingw32-windres)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static) # no library of the compiler's beside the program
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES TASKVEC_CROSS_ROOT)
set(CMAKE_CROSSCOMPILING_EMULATOR env WINEDEBUG=-all wine)
set(CMAKE_FIND_ROOT_PATH ${TASKVEC_CROSS_ROOT} /usr/x86_64-w64-mingw32)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
