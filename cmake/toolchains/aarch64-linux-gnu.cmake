# SPDX-License-Identifier: Apache-2.0
# For 64-bit ARM under Linux, by Debian's g++-aarch64-linux-gnu; programs that the build runs, tests among them, run under qemu-user:
#
#     cmake -B build/aarch64 -G Ninja -D CMAKE_TOOLCHAIN_FILE=cmake/toolchains/aarch64-linux-gnu.cmake
#
# Libraries for ARM that are not installed here may lie in a folder of their own, as Debian's arm64 packages unpacked (dpkg -x):
# name it with -D TASKVEC_CROSS_ROOT=FOLDER. scripts/check-cross makes one.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES TASKVEC_CROSS_ROOT)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
if(TASKVEC_CROSS_ROOT)
    list(PREPEND CMAKE_PREFIX_PATH ${TASKVEC_CROSS_ROOT}/usr)
    list(APPEND CMAKE_CROSSCOMPILING_EMULATOR -E LD_LIBRARY_PATH=${TASKVEC_CROSS_ROOT}/usr/lib/aarch64-linux-gnu)
endif()
