// The file that is built for a wide processor.
// SPDX-License-Identifier: Apache-2.0
#include "work.hpp"

std::uint64_t wide_work();
std::uint64_t wide_work()
{
    return work();
}
