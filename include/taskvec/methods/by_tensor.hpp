// Merges whose options depend on the tensor: a callback name -> options.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/callback.hpp>
#include <taskvec/core/csv.hpp>
#include <taskvec/core/option_text.hpp>
#include <taskvec/methods/merge.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The tensors that take part, in groups of the same options: their places in models.tensors(), ascending. The options
/// of a group are those of its first tensor. A group for each set of values, in the order of their first tensors.
template <described_options Options>
struct tensor_group {
    Options options{}; ///< of all of them
    std::vector<std::size_t> tensors{}; ///< places in models.tensors(), ascending
};
/// Groups the tensors that take part by what `options_of(name)` says of each.
template <described_options Options>
[[nodiscard]] std::vector<tensor_group<Options>> group_by_options(
    const aligned_models& models, const callback<Options(std::string_view)>& options_of);

/// merge() with options that depend on the tensor: λ by layer, another density for embeddings, weights of tasks by
/// pattern. `options_of(name)` gives those of a tensor. Tensors with equal options are merged together, as merge()
/// merges a model of just these: a share of entries in model scope is a share of theirs. Where all options are equal
/// that is merge() itself, bit for bit; where a method knows no model-wide numbers, every tensor has the bits that
/// merge() with its options gives it. Errors, threads and cost as merge(): each tensor is read as often.
///
///     merge_by_tensor<task_arithmetic_options>(cpu{}, [](std::string_view name) {
///         return task_arithmetic_options{.lambda = name.starts_with("lm_head") ? 0.1 : 0.5};
///     }, models, sink);
template <merge_method Options>
    requires described_options<Options>
merge_report merge_by_tensor(const cpu& policy, const callback<Options(std::string_view)>& options_of,
    const aligned_models& models, tensor_sink& out);

namespace detail {

template <described_options Options>
[[nodiscard]] std::string text_of_options(const Options& options)
{
    std::string text;
    for_each_option(options, [&]<class Value>(const auto& row, const Value& member) {
        text += std::string(row.name) + "=";
        if constexpr (std::same_as<Value, std::vector<double>>) {
            for (const double x : member) { text += csv_number(x) + ","; }
        }
        else {
            text += write_option(member);
        }
        text += ";";
    });
    return text;
}

} // namespace detail

template <described_options Options>
std::vector<tensor_group<Options>> group_by_options(
    const aligned_models& models, const callback<Options(std::string_view)>& options_of)
{
    std::vector<tensor_group<Options>> groups;
    std::map<std::string, std::size_t> places;
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        auto options = options_of(models.tensors()[i].name);
        const auto [place, fresh] = places.emplace(detail::text_of_options(options), groups.size());
        if (fresh) { groups.push_back({std::move(options), {}}); }
        groups[place->second].tensors.push_back(i);
    }
    return groups;
}

template <merge_method Options>
    requires described_options<Options>
merge_report merge_by_tensor(const cpu& policy, const callback<Options(std::string_view)>& options_of,
    const aligned_models& models, tensor_sink& out)
{
    const auto groups = group_by_options(models, options_of);
    if (groups.size() == 1) { return merge(policy, groups.front().options, models, out); }
    merge_report report;
    for (const auto& group : groups) {
        report += merge(policy, group.options, aligned_models(models, group.tensors), out);
    }
    detail::copy_through(policy, models, out);
    return report;
}

} // namespace taskvec::inline TASKVEC_ABI
