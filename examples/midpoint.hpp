// A merge method of one's own, in one file: halfway between the smallest and the largest task vector, entry by entry.
// own_method.cpp runs it in every way that there is; own_tool/ makes it a --method of the command line tool.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>

namespace example {

// What a caller may choose.
struct midpoint_options {
    double lambda = 1;
};

// [body]
// What becomes of each entry: θ0 + λ·½(min τt + max τt). `In` shows a pack of entries: a few numbers in a vector, or
// one. There are no branches on packs; select() chooses lane by lane. NaN and infinity are refused before they get
// here.
template <class A>
struct midpoint_body {
    static constexpr bool watches = false;
    A lambda;

    template <class In>
    TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        auto least = in.delta(0), most = in.delta(0);
        for (std::size_t t = 1; t < in.tasks(); ++t) {
            const auto x = in.delta(t);
            least = select(x < least, x, least);
            most = select(x > most, x, most);
        }
        return in.base() + lambda * (0.5f * (least + most));
    }
};
// [end]

} // namespace example

// What it is called, option by option: for the tool's flags and for options read from text.
template <>
struct taskvec::options_of<example::midpoint_options> {
    static constexpr taskvec::option_table table{
        taskvec::option_row("lambda", &example::midpoint_options::lambda, "scale of the merged task vector")};
};

// The method itself: hands out the body of each tensor. Its options are finite, as the table says, and checked before.
template <>
class taskvec::method<example::midpoint_options> : public taskvec::elementwise_method {
public:
    template <class Passes>
    method(Passes&, const example::midpoint_options& options)
        : lambda_(options.lambda)
    { }
    template <taskvec::arithmetic_element A>
    [[nodiscard]] example::midpoint_body<A> body(std::size_t) const
    {
        return {static_cast<A>(lambda_)};
    }

private:
    double lambda_;
};
