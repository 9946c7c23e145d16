// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/config.hpp>

#include <doctest/doctest.h>

#include <string_view>

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

TEST_CASE("the inline namespace names the version and the options that change a type's meaning")
{
    CHECK(std::string_view(TEXT(TASKVEC_ABI))
        == "v" TEXT(TASKVEC_VERSION_MAJOR) "_" TEXT(TASKVEC_VERSION_MINOR) "_throws_host");
}
