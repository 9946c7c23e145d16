# SPDX-License-Identifier: Apache-2.0
# For 32-bit x86 under Linux, by Debian's g++-i686-linux-gnu; programs that the build runs, tests among them, run on this machine's
# processor, where its kernel lets them:
#
#     cmake -B build/i686 -G Ninja -D CMAKE_TOOLCHAIN_FILE=cmake/toolchains/i686-linux-gnu.cmake
#
# x87 keeps more digits than a type has, and off_t is 32 bits wide unless it is asked for otherwise.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR i686)
set(CMAKE_CXX_COMPILER i686-linux-gnu-g++)
set(CMAKE_CXX_FLAGS_INIT "-msse2 -mfpmath=sse -D_FILE_OFFSET_BITS=64")
set(CMAKE_CROSSCOMPILING_EMULATOR /usr/i686-linux-gnu/lib/ld-linux.so.2 --library-path /usr/i686-linux-gnu/lib)
