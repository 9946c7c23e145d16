// Adapters to merge: what they carry beside their factors.
// SPDX-License-Identifier: Apache-2.0
#include "align_adapters.hpp"

#include <taskvec/core/overflow.hpp>
#include <taskvec/core/storage.hpp>

#include <cstddef>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>

namespace tool {

template <class T>
void call_biases(adapter_group<T>& group, const std::set<std::string>& adapted)
{
    constexpr std::string_view plain = ".bias";
    const auto call = [&](taskvec::peft_adapter<T>& adapter) {
        std::map<std::string, taskvec::peft_tensor> called;
        for (auto& [name, tensor] : adapter.others) {
            auto other = name;
            if (name.ends_with(plain)) {
                const auto tail = name.ends_with(taskvec::peft_base_bias) ? taskvec::peft_base_bias : plain;
                other.resize(name.size() - tail.size());
                other += adapted.contains(other) ? taskvec::peft_base_bias : plain;
            }
            if (!called.emplace(other, std::move(tensor)).second) {
                taskvec::raise<taskvec::format_error>(taskvec::error_code::adapter_tensors,
                    taskvec::message("'", name, "' and '", other, "' are one bias: take one of them out"),
                    adapter.label);
            }
        }
        adapter.others = std::move(called);
    };
    for (auto& adapter : group.adapters) { call(adapter); }
    call(group.initial);
}

template <class T>
void check_whole_or_factored(const adapter_group<T>& group)
{
    for (const auto& whole : group.adapters) {
        for (const auto& [name, tensor] : whole.others) {
            if (!name.ends_with(".weight") || name.ends_with(taskvec::peft_base_weight)) { continue; }
            const auto module = name.substr(0, name.rfind('.'));
            if (whole.updates.contains(module)) { continue; }
            for (const auto& other : group.adapters) {
                if (!other.updates.contains(module)) { continue; }
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                    taskvec::message("module '", module, "' comes whole with '", whole.label, "', and '", other.label,
                        "' has factors of it, which no one adapter holds: leave what is whole out "
                        "(--modules-to-save drop), or fold each into the base (taskvec fuse) and merge the "
                        "models"));
            }
        }
    }
}

namespace {

/// The mean by weight of a tensor that the adapters `owners` carry whole, in the first one's dtype.
template <class T>
taskvec::peft_tensor mean_of(
    const adapter_group<T>& group, const std::string& name, const std::vector<std::size_t>& owners)
{
    auto joined = group.adapters[owners[0]].others.at(name);
    const auto& label = group.adapters[owners[0]].label;
    double total = 0;
    std::vector<double> sum(taskvec::element_count(joined.shape));
    for (const auto i : owners) {
        const auto& tensor = group.adapters[i].others.at(name);
        if (tensor.shape != joined.shape) {
            taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
                taskvec::message("tensor '", name, "' has shape ", taskvec::to_string(tensor.shape), " in '",
                    group.adapters[i].label, "' but ", taskvec::to_string(joined.shape), " in '", label,
                    "': they have no mean; take one of them (--modules-to-save first), or none (drop)"));
        }
        total += group.weights[i];
        taskvec::visit_storage(tensor.dtype, name, [&]<class S>(std::type_identity<S>) {
            for (std::size_t k = 0; k < sum.size(); ++k) {
                S value;
                std::memcpy(&value, tensor.bytes.data() + k * sizeof(S), sizeof(S));
                sum[k] += group.weights[i] * static_cast<double>(taskvec::widen<taskvec::arithmetic_type<S>>(value));
            }
        });
    }
    if (total == 0) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::weights_sum_zero,
            taskvec::message("the weights of the adapters that carry '", name,
                "' sum to 0, and nothing can be divided by that: take one of them (--modules-to-save first)"));
    }
    taskvec::visit_storage(joined.dtype, name, [&]<class S>(std::type_identity<S>) {
        for (std::size_t k = 0; k < sum.size(); ++k) {
            const auto mean = static_cast<taskvec::arithmetic_type<S>>(sum[k] / total);
            std::uint64_t saturated = 0;
            const S value = taskvec::narrow_within<S>(mean, overflow_of(group.given.overflow), saturated, [&] {
                taskvec::raise<taskvec::nonfinite_error>(taskvec::error_code::result_overflow,
                    taskvec::message("the mean of tensor '", name, "' would be ", sum[k] / total, " at index ", k,
                        ", which ", taskvec::to_string(joined.dtype),
                        " cannot hold; take one of the adapters' (--modules-to-save first), or let it saturate "
                        "or propagate (--overflow)"));
            });
            std::memcpy(joined.bytes.data() + k * sizeof(S), &value, sizeof(S));
        }
    });
    return joined;
}

} // namespace

template <class T>
void join_whole_modules(adapter_group<T>& group)
{
    const bool mean = group.given.modules_to_save == "average";
    if (!mean && group.given.modules_to_save != "first") { return; }
    std::map<std::string, std::vector<std::size_t>> carried; // by whom
    std::set<std::string> listed;
    for (std::size_t i = 0; i < group.adapters.size(); ++i) {
        for (const auto& [name, tensor] : group.adapters[i].others) {
            if (!name.ends_with(taskvec::peft_base_weight)) { carried[name].push_back(i); }
        }
        const auto list = group.adapters[i].config.find("modules_to_save");
        if (list == group.adapters[i].config.end() || !list->is_array()) { continue; }
        for (const auto& module : *list) {
            if (module.is_string()) { listed.insert(module.template get<std::string>()); }
        }
    }
    for (const auto& [name, owners] : carried) {
        auto joined = group.adapters[owners[0]].others.at(name);
        if (mean && owners.size() > 1) { joined = mean_of(group, name, owners); }
        for (auto& adapter : group.adapters) { adapter.others[name] = joined; }
        group.initial.others[name] = joined; // of which nothing is merged
    }
    for (auto& adapter : group.adapters) {
        if (!listed.empty()) { adapter.config["modules_to_save"] = listed; }
    }
}

template void call_biases(adapter_group<float>&, const std::set<std::string>&);
template void call_biases(adapter_group<double>&, const std::set<std::string>&);
template void check_whole_or_factored(const adapter_group<float>&);
template void check_whole_or_factored(const adapter_group<double>&);
template void join_whole_modules(adapter_group<float>&);
template void join_whole_modules(adapter_group<double>&);

} // namespace tool
