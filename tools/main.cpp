// The taskvec command line.
// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"

#include <malloc.h>

int main(int argc, char** argv)
{
#if defined(M_MMAP_THRESHOLD)
    // Large blocks go back to the system when they are freed; left alone, glibc soon keeps them, and --memory would be
    // passed.
    ::mallopt(M_MMAP_THRESHOLD, 128 * 1024);
#endif
    return tool::run_command_line(argc, argv);
}
