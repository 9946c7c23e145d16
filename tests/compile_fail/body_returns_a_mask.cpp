// A body that returns a mask.
// SPDX-License-Identifier: Apache-2.0
// error: the call operator of a merge method's body returns what becomes of the entries
// lines: 30
#include <taskvec/methods/merge.hpp>

#include <vector>

struct own_options { };

template <class A>
struct own_body {
    static constexpr bool watches = false;
#ifdef TASKVEC_FAULT
    template <class In>
    TASKVEC_INLINE auto operator()(In& in) const
    {
        return in.task(0) > in.base();
    }
#else
    template <class In>
    TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return select(~(in.task(0) > in.base()) & (in.task(0) != 0), in.task(0), in.base());
    }
#endif
};

template <>
class taskvec::method<own_options> : public taskvec::elementwise_method {
public:
    template <class Passes>
    method(Passes&, const own_options&)
    { }
    template <arithmetic_element A>
    [[nodiscard]] own_body<A> body(std::size_t) const
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
