// The taskvec command line.
// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"
#include "runner.hpp"

#include <fcntl.h>
#include <malloc.h>
#include <unistd.h>

namespace {

/// What is closed is opened on nothing: a model file would take its number, and receive what is printed. Writing to
/// standard output stays an error.
void occupy_standard_descriptors()
{
    for (int descriptor = 0; descriptor < 3; ++descriptor) {
        if (::fcntl(descriptor, F_GETFD) == -1) {
            (void)!::open("/dev/null", descriptor == 0 ? O_WRONLY : O_RDONLY); // the lowest free number: this one
        }
    }
}

/// Before all that allocates: what ends before main() ends in one line too.
[[gnu::constructor(101)]] void install_early()
{
    tool::install_handlers();
}

} // namespace

int main(int argc, char** argv)
{
    occupy_standard_descriptors();
#if defined(M_MMAP_THRESHOLD)
    // Large blocks go back to the system when they are freed; left alone, glibc soon keeps them, and --memory would be
    // passed.
    ::mallopt(M_MMAP_THRESHOLD, 128 * 1024);
#endif
    return tool::run_command_line(argc, argv);
}
