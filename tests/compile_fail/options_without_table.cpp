// Options without a table are refused where one is needed, by a sentence that says what to write.
// SPDX-License-Identifier: Apache-2.0
// error: this options struct has no table: specialise taskvec::options_of
#include <taskvec/core/option_table.hpp>

struct options {
    double share = 0.5;
};
#if !defined(TASKVEC_FAULT)
template <>
struct taskvec::options_of<options> {
    static constexpr option_table table{option_row("share", &options::share, "share of entries kept")};
};
#endif

int f()
{
    int rows = 0;
    options all;
    taskvec::for_each_option(all, [&](const auto&, double&) { ++rows; });
    return rows;
}
