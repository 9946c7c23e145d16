// A merge method that does not say what kind it is.
// SPDX-License-Identifier: Apache-2.0
// error: a merge method derives from taskvec::elementwise_method, or general_method
// lines: 30
#include <taskvec/methods/linear_body.hpp>
#include <taskvec/methods/merge.hpp>

struct own_options { };

template <>
#ifdef TASKVEC_FAULT
class taskvec::method<own_options> {
#else
class taskvec::method<own_options> : public taskvec::elementwise_method {
#endif
public:
    template <class Passes>
    method(Passes&, const own_options&)
    { }
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
