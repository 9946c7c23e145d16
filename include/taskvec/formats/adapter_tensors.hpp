// The tensors of an adapter's file, sorted by what they are, and the dialect that they are of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/adapter_roles.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// The tensors of one module.
struct adapter_parts {
    std::map<adapter_role::what, const safetensors_entry*> tensors{};
    [[nodiscard]] const safetensors_entry* get(adapter_role::what which) const
    {
        const auto place = tensors.find(which);
        return place == tensors.end() ? nullptr : place->second;
    }
};

/// The tensors of a file by what they are. Refers to the file.
struct adapter_tensors {
    std::map<std::string, adapter_parts> parts{}; ///< factors, and what belongs to them, by module
    std::vector<std::pair<std::string, const safetensors_entry*>> wholes{}; ///< trained whole, under the base's names
    std::vector<std::pair<std::string, const safetensors_entry*>> copies{}; ///< of weights of the base, likewise
    adapter_dialect dialect = adapter_dialect::peft;

    /// The modules that have parts.
    [[nodiscard]] std::vector<std::string> modules() const
    {
        std::vector<std::string> names;
        for (const auto& one : parts) { names.push_back(one.first); }
        return names;
    }
};

/// Sorts the tensors of one file. For one call of sort().
class adapter_sorter {
public:
    explicit adapter_sorter(const safetensors_file& file)
        : file_(file)
        , refuse_{file.path().string()}
    { }
    /// Throws format_error for a tensor that is no part of an adapter, or is there twice; more dialects, or adapters,
    /// than one.
    [[nodiscard]] adapter_tensors sort()
    {
        const auto& entries = file_.entries();
        const bool prefixed = std::any_of(
            entries.begin(), entries.end(), [](const auto& entry) { return entry.name.starts_with(peft_prefix); });
        for (const auto& entry : entries) {
            const auto found = role_of(prefixed ? without_prefix(entry) : std::string_view(entry.name));
            if (found.role == role::ignored) { continue; }
            check_known(found, entry);
            check_gathered(entry);
            check_dialect(found, entry);
            check_adapter(found);
            put(found, entry);
        }
        settle_dialect();
        if (sorted_.dialect == adapter_dialect::mlx) { take_mlx_magnitudes(); }
        return std::move(sorted_);
    }

private:
    using role = adapter_role;

    [[nodiscard]] std::string_view without_prefix(const safetensors_entry& entry) const
    {
        const std::string_view name = entry.name;
        if (!name.starts_with(peft_prefix)) {
            const bool kohya = !kohya_component_of(name).prefix.empty();
            refuse_(error_code::adapter_tensors, "tensor '", name, "' does not begin with '", peft_prefix,
                "' as others of it do",
                kohya ? ", which are PEFT's: this one is kohya's, and an adapter has names of one dialect" : "");
        }
        return name.substr(peft_prefix.size());
    }
    void check_gathered(const safetensors_entry& entry) const
    {
        if (entry.shape == extents{0}) {
            refuse_(error_code::adapter_tensors, "tensor '", entry.name, "' ", not_gathered);
        }
    }
    void check_known(const adapter_role& found, const safetensors_entry& entry) const
    {
        if (found.role == role::unknown) {
            refuse_(error_code::adapter_unsupported, "tensor '", entry.name,
                "' is no part of a LoRA, AdaLoRA, DoRA, LoHa or LoKr adapter: fold it into its base with what wrote "
                "it");
        }
    }
    /// diffusers writes PEFT's names too, under the names of its components.
    [[nodiscard]] static bool of_diffusers(adapter_dialect dialect, std::string_view name)
    {
        return (dialect == adapter_dialect::peft || dialect == adapter_dialect::diffusers)
            && !component_of(name).empty();
    }
    /// Learns the dialect from the names of factors.
    void check_dialect(const adapter_role& found, const safetensors_entry& entry)
    {
        const bool stored_whole =
            found.role == role::whole || found.role == role::base_copy || found.role == role::trained_bias;
        if (!found.dialect || stored_whole) { return; }
        if (!dialect_) {
            dialect_ = found.dialect;
            first_name_ = entry.name;
        }
        if (*dialect_ == *found.dialect) { return; }
        if (!of_diffusers(*dialect_, first_name_) || !of_diffusers(*found.dialect, entry.name)) {
            refuse_(error_code::adapter_tensors, "mixes dialects: '", first_name_, "' is ", to_string(*dialect_),
                "'s, and '", entry.name, "' ", to_string(*found.dialect), "'s; split the file, or save it anew");
        }
        dialect_ = adapter_dialect::diffusers;
    }
    void check_adapter(const adapter_role& found)
    {
        if (found.adapter.empty()) { return; }
        if (!adapter_.empty() && found.adapter != adapter_) {
            refuse_(error_code::adapter_tensors, "holds the adapters '", adapter_, "' and '", found.adapter,
                "': save each into a file of its own");
        }
        adapter_ = found.adapter;
    }
    void put(const adapter_role& found, const safetensors_entry& entry)
    {
        switch (found.role) {
        case role::whole: sorted_.wholes.emplace_back(found.module, &entry); break;
        case role::trained_bias: sorted_.wholes.emplace_back(found.module + ".bias", &entry); break;
        case role::base_copy: sorted_.copies.emplace_back(found.module + ".weight", &entry); break;
        default: put_part(found, entry);
        }
    }
    void put_part(const adapter_role& found, const safetensors_entry& entry)
    {
        const auto [place, is_first] = sorted_.parts[found.module].tensors.emplace(found.role, &entry);
        if (is_first) { return; }
        // Embeddings that PEFT saves whole bring their magnitudes once more, under another name.
        const auto& first = *place->second;
        const bool once_more = first.dtype == entry.dtype && first.shape == entry.shape
            && std::memcmp(file_.tensor(first).data, file_.tensor(entry).data, entry.bytes) == 0;
        if (!once_more) {
            refuse_(error_code::adapter_tensors, "tensor '", entry.name, "' is the second such factor of its module");
        }
    }
    /// Names of LoHa and LoKr do not tell it, but for kohya's underscores.
    void settle_dialect()
    {
        const bool underscored = std::any_of(sorted_.parts.begin(), sorted_.parts.end(),
            [](const auto& one) { return !kohya_component_of(one.first).prefix.empty(); });
        sorted_.dialect = dialect_.value_or(underscored ? adapter_dialect::kohya : adapter_dialect::peft);
    }
    /// MLX's DoRA keeps the magnitudes of a module as MODULE.m.
    void take_mlx_magnitudes()
    {
        std::erase_if(sorted_.wholes, [&](const auto& one) {
            const auto& name = one.first;
            if (!name.ends_with(".m")) { return false; }
            const auto module = sorted_.parts.find(name.substr(0, name.size() - 2));
            return module != sorted_.parts.end() && module->second.tensors.emplace(role::magnitude, one.second).second;
        });
    }

    const safetensors_file& file_;
    refusal refuse_;
    adapter_tensors sorted_{};
    std::optional<adapter_dialect> dialect_{}; ///< nothing: no name has told it yet
    std::string first_name_{}; ///< that told it
    std::string adapter_{}; ///< the name of the adapter, where names of tensors have it
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
