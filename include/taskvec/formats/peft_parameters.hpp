// Parameters of several matrices that PEFT adapts (target_parameters): whose factors are whose, and their split.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/formats/peft.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// The parameters that PEFT adapts whole modules' worth of (target_parameters), by the modules of a file's factors.
/// Factors of several parameters of one module are nested: "experts" has those of the last one, "experts.base_layer"
/// those of the one before it, in the order in which the model has them.
class peft_parameters {
public:
    peft_parameters() = default;
    /// `modules`: all that the file has. Throws format_error for a field of another type.
    peft_parameters(const nlohmann::json& config, const std::vector<std::string>& modules, const std::string& file)
        : file_(file)
        , modules_(modules)
    {
        const auto* const given = peft_fields(config, file).find("target_parameters");
        if (!given) { return; }
        if (!is_list_of_texts(*given)) {
            raise<format_error>(error_code::adapter_config,
                message("target_parameters is ", peft_fields::shown(*given), "; expected names of parameters"), file);
        }
        targets_ = given->template get<std::vector<std::string>>();
    }
    /// The name of the parameter that a module's factors are of; empty: the module's weight. Throws format_error where
    /// nothing says which one of several it is, or factors of one are missing.
    [[nodiscard]] std::string of(const std::string& module)
    {
        constexpr std::string_view nested = ".base_layer";
        std::string_view owner = module;
        std::size_t depth = 0;
        for (; owner.ends_with(nested); ++depth) { owner.remove_suffix(nested.size()); }
        std::vector<std::string> own; // the last segments
        for (const auto& target : targets_) {
            const auto dot = target.rfind('.');
            const auto within = dot == target.npos ? std::string("experts") : target.substr(0, dot);
            const auto last = target.substr(dot == target.npos ? 0 : dot + 1);
            const bool meant = owner == within || owner.ends_with("." + within);
            if (meant) { used_.push_back(target); }
            if (meant && std::find(own.begin(), own.end(), last) == own.end()) { own.push_back(last); }
        }
        if (own.empty()) { return ""; }
        if (own.size() > 1) {
            const std::vector<std::string> known{"gate_up_proj", "down_proj"}; // as every model has them
            if (own.size() != 2 || !std::is_permutation(own.begin(), own.end(), known.begin())) {
                raise<format_error>(error_code::adapter_unsupported,
                    message("target_parameters names '", own[0], "' and '", own[1], "' of module '", owner,
                        "', and which factors are whose is not known here: ", fold_with_peft),
                    file_);
            }
            own = known;
        }
        std::string layer(owner);
        for (std::size_t i = 0; i < own.size(); ++i, layer += nested) {
            if (std::find(modules_.begin(), modules_.end(), layer) != modules_.end()) { continue; }
            raise<format_error>(error_code::adapter_tensors,
                message("target_parameters names '", own[own.size() - 1 - i], "' of module '", owner,
                    "', and the adapter has no factors '", layer, ".lora_A' of it: fetch or save it anew"),
                file_);
        }
        if (depth >= own.size()) {
            raise<format_error>(error_code::adapter_tensors,
                message("the adapter has factors of '", module, "', and target_parameters names ", own.size(),
                    " of the parameters of '", owner, "': fetch or save it anew"),
                file_);
        }
        return std::string(owner) + "." + own[own.size() - 1 - depth];
    }
    /// Throws format_error for a name of which the file has no factors.
    void check_used() const
    {
        for (const auto& target : targets_) {
            if (std::find(used_.begin(), used_.end(), target) != used_.end()) { continue; }
            raise<format_error>(error_code::adapter_tensors,
                message("target_parameters names '", target,
                    "', and the adapter has no factors of it: fetch or save it anew, or take the name out"),
                file_);
        }
    }

private:
    std::string file_;
    std::vector<std::string> modules_, targets_, used_;
};

/// Splits the factors of a parameter of `count` matrices: those of lora_A stand one below the other, those of lora_B's
/// columns alternate. `made` has them as they are stored.
template <class T>
[[nodiscard]] std::vector<lora_update<T>> split_factors(const lora_update<T>& made, std::size_t count)
{
    const std::size_t rank = made.rank() / count;
    std::vector<lora_update<T>> parts;
    for (std::size_t e = 0; e < count; ++e) {
        lora_update<T> one{matrix<T>(made.out(), rank, matrix_order::row_major),
            matrix<T>(rank, made.in(), matrix_order::row_major), made.scaling};
        for (std::size_t k = 0; k < rank; ++k) {
            for (std::size_t i = 0; i < made.out(); ++i) { one.b(i, k) = made.b(i, k * count + e); }
            for (std::size_t j = 0; j < made.in(); ++j) { one.a(k, j) = made.a(e * rank + k, j); }
        }
        parts.push_back(std::move(one));
    }
    return parts;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
