// NearSwap: takes another model's entries where they are near the base's, and goes a fixed way towards the rest.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = w·θ1 + (1 − w)·θ0, elementwise, with w = min(t / max(|θ0 − θ1|, 1e-6), 1): entries closer than t become θ1's,
/// others move by t. After alchemonaut's NearSwap, in the operations of mergekit's `nearswap`, where the quotient is t
/// times a reciprocal, every one rounded in f32 (f64 for f64): bit-exact. Errors: invalid_argument (t below 0; another
/// number of tasks than one). Cost: one read of the models.
///
///     merge(cpu{}, nearswap_options{.t = 0.001}, base, tasks, out);
struct nearswap_options {
    double t = 0.001;
};

template <>
struct options_of<nearswap_options> {
    static constexpr option_table table{
        option_row("t", &nearswap_options::t, "how near entries are to be taken, and how far others go",
            {.at_least = 0, .expected = "a distance of at least 0, such as 0.001"})};
};

/// What nearswap_options says of an entry.
template <arithmetic_element A>
struct nearswap_body {
    static constexpr bool watches = false;
    A t; ///< the distance

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        const auto one = filled<pack>(1);
        auto apart = from_bits(magnitude_of(in.base() - in.task(0)));
        const auto least = filled<pack>(static_cast<A>(1e-6));
        apart = select(apart < least, least, apart);
        auto weight = t * (one / apart);
        weight = select(weight > one, one, weight);
        return weight * in.task(0) + (one - weight) * in.base();
    }
};

template <>
class method<nearswap_options> : public elementwise_method {
public:
    template <class Passes>
    method(Passes& passes, const nearswap_options& options)
        : t_(options.t)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(error_code::task_count,
                message("NearSwap takes a base and one task, and there are ", passes.tasks(), " tasks: give one"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] nearswap_body<A> body(std::size_t) const
    {
        return {static_cast<A>(t_)};
    }

private:
    double t_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, nearswap_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
