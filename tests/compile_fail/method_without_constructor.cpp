// A merge method that is made of nothing: what it needs before the walk is its constructor.
// SPDX-License-Identifier: Apache-2.0
// error: a merge method has a constructor: template <class Passes> method
// lines: 30
#include <taskvec/methods/linear_body.hpp>
#include <taskvec/methods/merge.hpp>

struct own_options { };

template <>
class taskvec::method<own_options> : public taskvec::elementwise_method {
public:
#ifndef TASKVEC_FAULT
    template <class Passes>
    method(Passes&, const own_options&)
    { }
#endif
    template <arithmetic_element A>
    [[nodiscard]] pair_body<A> body(std::size_t) const
    {
        return {A{1}, A{0}, true};
    }
};

int main()
{
    std::vector<float> base(3), out(3);
    const std::vector<std::vector<float>> tasks{base};
    taskvec::merge(taskvec::cpu{}, own_options{}, base, tasks, out);
}
