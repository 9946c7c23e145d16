// A body that branches on a pack, whose entries may differ.
// SPDX-License-Identifier: Apache-2.0
// error: a body must not branch on a pack
#include <taskvec/methods/merge.hpp>

struct larger_options { };

template <class A>
struct larger_body {
    static constexpr bool watches = false;
    template <class In>
    TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
#ifdef TASKVEC_FAULT
        if (in.task(0) > in.base()) { return in.task(0); }
        return in.base();
#else
        return select(in.task(0) > in.base(), in.task(0), in.base());
#endif
    }
};

template <>
class taskvec::method<larger_options> : public taskvec::elementwise_method {
public:
    template <class Passes>
    method(Passes&, const larger_options&)
    { }
    template <arithmetic_element A>
    [[nodiscard]] larger_body<A> body(std::size_t) const
    {
        return {};
    }
};

int main()
{
    std::vector<float> base(3), out(3);
    const std::vector<std::vector<float>> tasks{base};
    taskvec::merge(taskvec::cpu{}, larger_options{}, base, tasks, out);
}
