// A body that branches on a pack of numbers.
// SPDX-License-Identifier: Apache-2.0
// error: a body must not branch on a pack
// lines: 170
#include <taskvec/methods/merge.hpp>

#include <vector>

struct own_options { };

template <class A>
struct own_body {
    static constexpr bool watches = false;
#ifdef TASKVEC_FAULT
    template <class In>
    TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        if (in.task(0)) { return in.base(); }
        return in.task(0);
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
