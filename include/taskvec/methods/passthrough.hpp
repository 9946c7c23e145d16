// One model as it is, or scaled: a merge of slices takes layers from it, and layers grow or fade.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = scale·θ1, elementwise, of the one task. Needs no base. The scale is rounded to f32 (f64 for f64) once; a scale
/// of 1 keeps every bit that the output's dtype holds. Bit-exact. Errors: invalid_argument (scale; another number of
/// tasks than one).
///
///     merge(cpu{}, passthrough_options{.scale = 0.5}, std::vector{task}, out);
struct passthrough_options {
    double scale = 1.0;
};

template <>
struct options_of<passthrough_options> {
    static constexpr option_table table{option_row("scale", &passthrough_options::scale, "factor of every entry")};
};

/// factor·θ1.
template <arithmetic_element A>
struct scaled_body {
    static constexpr bool watches = false;
    A factor; ///< of every entry

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return factor * in.task(0);
    }
};

template <>
class method<passthrough_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const passthrough_options& options)
        : scale_(options.scale)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(error_code::task_count,
                message("passthrough takes one model, and there are ", passes.tasks(), " tasks: give one"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] scaled_body<A> body(std::size_t) const
    {
        return {static_cast<A>(scale_)};
    }

private:
    double scale_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, passthrough_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
