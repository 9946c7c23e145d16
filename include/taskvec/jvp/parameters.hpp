// Named parameters of a network: values, and the view of values with tangents that a function under jvp() sees.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/jvp/primal_tangent.hpp>

#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Values by name, sorted by the bytes of the name. Value is row_matrix<T> (parameters) or primal_tangent<T> (what a
/// function under jvp() is given).
template <class Value>
class named_values {
public:
    /// A value and its name.
    struct entry {
        std::string name; ///< sorts by its bytes
        Value value; ///< owned
    };

    named_values() = default;
    /// In any order. Errors: as insert().
    named_values(std::initializer_list<entry> entries)
    {
        for (const auto& [name, value] : entries) { insert(name, value); }
    }

    /// Adds a value; a name that is already there is an invalid_argument.
    Value& insert(std::string name, Value value)
    {
        const auto place = detail::place_by_name(entries_, name);
        if (place != entries_.end() && place->name == name) {
            raise<invalid_argument>(error_code::tensor_repeated, message("parameter '", name, "' occurs twice"));
        }
        return entries_.insert(place, entry{std::move(name), std::move(value)})->value;
    }
    /// The value of that name, or nullptr.
    [[nodiscard]] const Value* find(std::string_view name) const { return found(entries_, name); }
    [[nodiscard]] Value* find(std::string_view name) { return found(entries_, name); }
    /// The value of that name; a missing one is an invalid_argument that names it.
    [[nodiscard]] const Value& operator[](std::string_view name) const { return required(entries_, name); }
    [[nodiscard]] Value& operator[](std::string_view name) { return required(entries_, name); }
    /// Whether there is a value of that name.
    [[nodiscard]] bool contains(std::string_view name) const { return find(name) != nullptr; }

    [[nodiscard]] auto begin() const noexcept { return entries_.begin(); }
    [[nodiscard]] auto end() const noexcept { return entries_.end(); }
    [[nodiscard]] auto begin() noexcept { return entries_.begin(); }
    [[nodiscard]] auto end() noexcept { return entries_.end(); }
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }
    /// Elements of all values together.
    [[nodiscard]] std::size_t element_count() const noexcept
    {
        std::size_t count = 0;
        for (const auto& [name, value] : entries_) { count += static_cast<std::size_t>(value.size()); }
        return count;
    }

private:
    template <class Entries>
    static auto found(Entries& entries, std::string_view name) -> decltype(&entries[0].value)
    {
        const auto one = detail::find_by_name(entries, name);
        return one ? &one->value : nullptr;
    }
    template <class Entries>
    static auto& required(Entries& entries, std::string_view name)
    {
        const auto value = found(entries, name);
        if (!value) {
            raise<invalid_argument>(error_code::tensor_missing,
                message("there is no parameter '", name, "' among the ", entries.size(), " given"));
        }
        return *value;
    }
    std::vector<entry> entries_;
};

/// The parameters of a network, or gradients or directions in their space (then any subset of the names).
///
///     parameters<float> phi{{"fc1.weight", w1}, {"fc1.bias", b1}};
template <differentiable_scalar T>
using parameters = named_values<row_matrix<T>>;

/// What a function under jvp() is given: every parameter, with a tangent where it is active.
template <differentiable_scalar T>
using active_parameters = named_values<primal_tangent<T>>;

/// The parameters as a model of 2-D tensors in the caller's memory, for merging; nothing is copied.
template <arithmetic_element T>
[[nodiscard]] model_ref as_model(parameters<T>& values)
{
    model_ref model;
    for (auto& [name, value] : values) {
        model.insert(name, {.data = value.data(), .dtype = dtype_of<T>, .shape = {value.rows(), value.cols()}});
    }
    return model;
}
template <arithmetic_element T>
[[nodiscard]] const_model_ref as_model(const parameters<T>& values)
{
    const_model_ref model;
    for (const auto& [name, value] : values) {
        model.insert(name, {.data = value.data(), .dtype = dtype_of<T>, .shape = {value.rows(), value.cols()}});
    }
    return model;
}

} // namespace taskvec::inline TASKVEC_ABI
