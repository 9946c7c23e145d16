// A merge method that says nothing of what becomes of entries.
// SPDX-License-Identifier: Apache-2.0
// error: a merge method has a body: template <arithmetic_element A> auto body
#include <taskvec/methods/linear_body.hpp>
#include <taskvec/methods/merge.hpp>

struct nothing_options { };

template <>
class taskvec::method<nothing_options> : public taskvec::elementwise_method {
public:
    template <class Passes>
    method(Passes&, const nothing_options&)
    { }
#ifndef TASKVEC_FAULT
    template <arithmetic_element A>
    [[nodiscard]] pair_body<A> body(std::size_t) const
    {
        return {A{1}, A{0}, true};
    }
#endif
};

int main()
{
    std::vector<float> base(3), out(3);
    const std::vector<std::vector<float>> tasks{base};
    taskvec::merge(taskvec::cpu{}, nothing_options{}, base, tasks, out);
}
