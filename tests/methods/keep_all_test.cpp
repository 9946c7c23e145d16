// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/keep/all.hpp>

#include <taskvec/methods/ties.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace {

struct untrimmed_options {
    taskvec::ties_options ties{};
};

} // namespace

template <>
class taskvec::method<untrimmed_options> : public taskvec::sign_election_method<taskvec::keep_all> {
public:
    template <class Passes>
    method(Passes& passes, const untrimmed_options& options)
        : sign_election_method(passes, options.ties, [] { return keep_all{}; })
    { }
};

TEST_CASE("an election among all entries is TIES of density 1")
{
    using namespace taskvec;
    std::vector<float> base(301), expected(301), found(301);
    std::vector<std::vector<float>> tasks{base, base, base};
    for (std::size_t i = 0; i < base.size(); ++i) {
        base[i] = static_cast<float>(i) * 0.01f;
        for (std::size_t t = 0; t < tasks.size(); ++t) {
            tasks[t][i] = base[i] + static_cast<float>((i * (t + 3)) % 7) * 0.125f - 0.375f;
        }
    }
    const ties_options options{.density = 1, .lambda = 0.5};
    merge(cpu{}, options, base, tasks, expected);
    merge(cpu{}, untrimmed_options{options}, base, tasks, found);
    CHECK(found == expected);
}
