// Three tasks on a base, of seven tensors of any types, and what methods want beside them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/merge.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace testing {

using namespace taskvec;

inline constexpr std::int64_t long_rows = 700; // of 100: more than a piece of rows, or a chunk, has
inline const std::vector<std::pair<std::string, extents>> sample_shapes{{"a.bias", {777}}, {"b.weight", {37, 301}},
    {"c.weight", {long_rows, 100}}, {"d.scale", {}}, {"e.conv", {4, 3, 5, 5}}, {"f.empty", {0, 4}},
    {"left.weight", {20, 30}}};

/// The dtype of each tensor in a model, by its number: 0 for the base.
using dtype_rule = dtype (*)(std::size_t model, std::size_t tensor);

/// A model that owns its memory.
struct stored_model {
    std::map<std::string, std::vector<std::byte>> memory;
    const_model_ref ref;

    void insert(const std::string& name, dtype type, const extents& shape, const std::vector<double>& values)
    {
        auto& bytes = memory[name];
        bytes.resize(byte_count(type, values.size()) + 8);
        visit_storage(type, name, [&]<class T>(std::type_identity<T>) {
            for (std::size_t i = 0; i < values.size(); ++i) {
                const auto word = narrow<T>(static_cast<arithmetic_type<T>>(values[i]));
                std::memcpy(bytes.data() + i * sizeof(T), &word, sizeof(T));
            }
        });
        ref.insert(name, {bytes.data(), type, shape});
    }
};

struct sample {
    stored_model base;
    std::vector<stored_model> tasks{3}, fishers{3};
    std::vector<std::int64_t> ids{3, 1, 4, 1, 5};

    explicit sample(dtype_rule rule)
    {
        std::mt19937 random(17);
        std::normal_distribution<double> normal;
        for (std::size_t i = 0; i < sample_shapes.size(); ++i) {
            const auto& [name, shape] = sample_shapes[i];
            std::vector<double> origin(element_count(shape));
            for (double& x : origin) { x = normal(random); }
            base.insert(name, rule(0, i), shape, origin);
            for (std::size_t t = 0; t < tasks.size(); ++t) {
                auto values = origin;
                for (double& x : values) { x += random() % 3 == 0 ? 0.25 * normal(random) : 0.0; }
                tasks[t].insert(name, rule(t + 1, i), shape, values);
                for (double& x : values) { x *= x; }
                fishers[t].insert(name, dtype::f32, shape, values);
            }
        }
        for (auto* const model : {&base, tasks.data(), &tasks[1], &tasks[2]}) {
            model->ref.insert("ids", {ids.data(), dtype::i64, {5}});
        }
    }
    [[nodiscard]] aligned_models models(std::size_t count, model_options options = {}) const
    {
        std::vector<const_model_ref> refs;
        for (std::size_t t = 0; t < count; ++t) { refs.push_back(tasks[t].ref); }
        options.include = [](std::string_view name) { return !name.starts_with("left."); };
        return {&base.ref, refs, options};
    }
};

/// What merge() writes, as a model.
struct written_model {
    std::vector<std::vector<std::byte>> memory;
    const_model_ref ref;

    template <class Merge>
    written_model(const aligned_models& models, const Merge& merge_into)
    {
        std::vector<void*> places;
        for (const auto& spec : models.outputs()) { places.push_back(memory.emplace_back(spec.bytes() + 8).data()); }
        memory_sink sink(places);
        merge_into(sink);
        for (std::size_t i = 0; i < places.size(); ++i) {
            const auto& spec = models.outputs()[i];
            ref.insert(spec.name, {places[i], spec.dtype, spec.shape});
        }
    }
};

inline dtype all_f32(std::size_t, std::size_t)
{
    return dtype::f32;
}
inline dtype all_bf16(std::size_t, std::size_t)
{
    return dtype::bf16;
}
inline dtype all_f16(std::size_t, std::size_t)
{
    return dtype::f16;
}
/// Every tensor another, and one model another than the rest.
inline dtype mixed_types(std::size_t model, std::size_t tensor)
{
    constexpr dtype types[] = {dtype::bf16, dtype::f32, dtype::f16, dtype::f64};
    return types[(tensor + (model == 2 ? 1 : 0)) % 4];
}

template <class Options>
Options options_for(const sample& from, std::size_t tasks)
{
    Options options{};
    if constexpr (std::same_as<Options, fisher_options>) {
        for (std::size_t t = 0; t < tasks; ++t) { options.fishers.push_back(from.fishers[t].ref); }
    }
    return options;
}

/// As many of the three tasks as a method takes.
template <class Options>
std::size_t tasks_for(const sample& from)
{
    for (std::size_t count = from.tasks.size(); count > 1; --count) {
        try {
            check_merge(cpu{}, options_for<Options>(from, count), from.models(count));
            return count;
        }
        catch (const invalid_argument&) { // NOLINT(bugprone-empty-catch): fewer of them
        }
    }
    return 1;
}

} // namespace testing
