// A base plus the kept entries of a task: how a pruned task is written out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/core/option_range.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/select/sparse.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A base plus sparse entries, as a merge method without tasks of its own: θ0 + scale·v̂, each product and sum in f32
/// (f64 for f64), rounded once. Tensors without an entry are copied bit for bit. The entries stay where they are, in
/// memory (views()) or in a mapped file (delta_file::parts()), as indices or as a bitmask. Bit-exact. Errors:
/// invalid_argument, shape_mismatch, dtype_mismatch; nonfinite_error for NaN or infinity in the base (see
/// model_options) or, if asked, among the entries. Memory: O(tensors).
///
///     const aligned_models models(&base, {&base, 1});
///     merge(cpu{}, sparse_addition_options{.entries = file.parts()}, models, sink);
struct sparse_addition_options {
    std::span<const sparse_view> entries{}; ///< each names its tensor; they outlive the options
    double scale = 1.0; ///< of every entry
    nonfinite on_nonfinite = nonfinite::propagate; ///< NaN and infinity among the entries
};

template <>
class method<sparse_addition_options> : public general_method {
public:
    method(const cpu_passes& passes, const sparse_addition_options& options)
        : scale_(options.scale)
        , on_nonfinite_(options.on_nonfinite)
    {
        const aligned_models& models = passes.models();
        detail::check_number("scale", {}, scale_);
        tensors_.assign(models.tensors().size(), nullptr);
        for (const auto& entries : options.entries) {
            const aligned_tensor* const place = detail::find_by_name(models.tensors(), entries.name);
            if (!place) {
                raise<invalid_argument>(error_code::tensor_unexpected,
                    message("tensor '", entries.name, "' of the delta is not a floating tensor of ",
                        models.options().base_label));
            }
            if (entries.shape != place->shape) {
                raise<shape_mismatch>(error_code::delta_shape,
                    message("tensor '", place->name, "' has shape ", to_string(place->shape), " in ",
                        models.options().base_label, "; the delta is for shape ", to_string(entries.shape)));
            }
            if (entries.wide && !place->wide) {
                raise<dtype_mismatch>(error_code::delta_dtype,
                    message("tensor '", place->name, "' is not F64 in ", models.options().base_label,
                        "; the delta holds F64 values"));
            }
            tensors_[static_cast<std::size_t>(place - models.tensors().data())] = &entries;
        }
    }
    template <arithmetic_element A>
    void operator()(row_block<A>& rows, A* merged, merge_tally&) const
    {
        std::memcpy(merged, rows.base(), rows.size() * sizeof(A));
        const auto* const entries = tensors_[rows.tensor_index()];
        if (!entries) { return; }
        entries->for_each(rows.offset(), rows.offset() + rows.size(), [&](std::uint64_t index, std::uint64_t entry) {
            const std::uint64_t place = index - rows.offset();
            const A value = entries->template value<A>(entry);
            if (!std::isfinite(value) && on_nonfinite_ == nonfinite::error) {
                raise<nonfinite_error>(error_code::not_finite,
                    message("the delta of tensor '", entries->name, "' holds ", std::isnan(value) ? "NaN" : "infinity",
                        " for index ", index,
                        ": make it again from sound models, or ask for non-finite values to propagate"));
            }
            kernels::add_at<A, A>(merged, &place, &value, static_cast<A>(scale_), 1);
        });
    }
    [[nodiscard]] bool nonfinite_beside(std::size_t tensor, std::uint64_t index) const
    {
        const auto* const entries = tensors_[tensor];
        bool found = false;
        if (entries) {
            entries->for_each(index, index + 1, [&](std::uint64_t, std::uint64_t entry) {
                found = found || !std::isfinite(entries->template value<double>(entry));
            });
        }
        return found;
    }

private:
    double scale_;
    nonfinite on_nonfinite_;
    std::vector<const sparse_view*> tensors_; // of each tensor
};

/// θ0 + scale·v̂ into a sink; the tensors are those of `models.outputs()`, aligned from the base alone. NaN and infinity
/// among the entries are what model_options say of those in the base.
///
///     const aligned_models models(&base, {&base, 1});
///     add_delta(cpu{}, models, file.parts(), 1.0, sink);
template <cpu_policy Policy>
void add_delta(const Policy& policy, const aligned_models& models, std::span<const sparse_view> delta, double scale,
    tensor_sink& out)
{
    merge(policy, sparse_addition_options{delta, scale, models.options().on_nonfinite}, models, out);
}
/// The same with entries in memory, among which NaN and infinity propagate.
template <cpu_policy Policy>
void add_delta(
    const Policy& policy, const aligned_models& models, const sparse_model& delta, double scale, tensor_sink& out)
{
    merge(policy, sparse_addition_options{views(delta), scale}, models, out);
}

} // namespace taskvec::inline TASKVEC_ABI
