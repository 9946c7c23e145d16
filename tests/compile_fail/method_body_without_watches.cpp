// A body that does not say whether it looks for NaN and infinity itself.
// SPDX-License-Identifier: Apache-2.0
// error: the body of a merge method says whether it hands NaN and infinity to in.watch
// lines: 30
#include <taskvec/methods/merge.hpp>

struct own_options { };

struct own_body {
#ifndef TASKVEC_FAULT
    static constexpr bool watches = false;
#endif
    template <class In>
    TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return in.task(0);
    }
};

template <>
class taskvec::method<own_options> : public taskvec::elementwise_method {
public:
    template <class Passes>
    method(Passes&, const own_options&)
    { }
    template <arithmetic_element A>
    [[nodiscard]] own_body body(std::size_t) const
    {
        return {};
    }
};

int main()
{
    std::vector<float> base(3), out(3);
    const std::vector<std::vector<float>> tasks{base};
    taskvec::merge(taskvec::cpu{}, own_options{}, base, tasks, out);
}
