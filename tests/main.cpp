// The one main function of every test program. Where a case could not run here, the program says so at the end and
// exits with 77, which ctest counts as skipped; a failure weighs more.
// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "skip.hpp"

#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace {

std::vector<std::string>& skipped()
{
    static std::vector<std::string> reasons;
    return reasons;
}

} // namespace

void testing::skip(std::string reason)
{
    skipped().push_back(std::move(reason));
}

int main(int argc, char** argv)
{
    const int code = doctest::Context(argc, argv).run();
    for (const auto& reason : skipped()) { std::printf("skipped: %s\n", reason.c_str()); }
    return code == 0 && !skipped().empty() ? 77 : code;
}
