// A keep rule that does not say whether it drops NaN and infinity.
// SPDX-License-Identifier: Apache-2.0
// error: the keep rule of a tensor says whether it never drops NaN and infinity
// lines: 180
#include <taskvec/methods/ties.hpp>

#include <vector>

struct keep_own {
#ifndef TASKVEC_FAULT
    static constexpr bool sees_all = true;
#endif
    template <class In>
    TASKVEC_INLINE typename In::pack operator()(const In&, std::size_t, const typename In::pack& x) const
    {
        return x;
    }
    template <taskvec::arithmetic_element A>
    [[nodiscard]] keep_own get(std::size_t) const
    {
        return *this;
    }
    [[nodiscard]] unsigned walks() const { return 0; }
};

struct own_options {
    taskvec::ties_options ties{};
};

template <>
class taskvec::method<own_options> : public taskvec::sign_election_method<keep_own> {
public:
    template <class Passes>
    method(Passes& passes, const own_options& options)
        : sign_election_method(passes, options.ties, [] { return keep_own{}; })
    { }
};

int main()
{
    std::vector<float> base(3), out(3);
    const std::vector<std::vector<float>> tasks{base};
    taskvec::merge(taskvec::cpu{}, own_options{}, base, tasks, out);
}
