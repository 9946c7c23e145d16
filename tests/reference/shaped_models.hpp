// Random models whose tensors have shapes, merged by a method: for methods that look at rows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "random_models.hpp"

#include <taskvec/methods/merge.hpp>

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace testing {

using shape_list = std::vector<std::vector<std::size_t>>;

/// Models whose tensors "t0", "t1", … have shapes.
template <class T>
struct shaped_models {
    shape_list shapes;
    random_models<T> flat;

    shaped_models(shape_list of, std::size_t tasks, unsigned seed, int levels = 0)
        : shapes(std::move(of))
        , flat(sizes_of(shapes), tasks, seed, levels)
    { }
    static std::vector<std::size_t> sizes_of(const shape_list& of)
    {
        std::vector<std::size_t> sizes;
        for (const auto& shape : of) {
            sizes.push_back(1);
            for (const auto extent : shape) { sizes.back() *= extent; }
        }
        return sizes;
    }
    template <class Model>
    [[nodiscard]] Model shaped(const Model& model) const
    {
        Model result;
        for (const auto& [name, tensor] : model) {
            auto one = tensor;
            const auto& shape = shapes[static_cast<std::size_t>(std::stoul(name.substr(1)))];
            one.shape.assign(shape.begin(), shape.end());
            result.insert(name, one);
        }
        return result;
    }
    template <class Options>
    [[nodiscard]] std::vector<T> merged(const Options& options, std::size_t chunk = 65536, unsigned threads = 2,
        taskvec::merge_report* report = nullptr) const
    {
        std::vector<T> out;
        taskvec::model_options how;
        how.chunk = chunk;
        how.statistics = report != nullptr;
        std::vector<taskvec::const_model_ref> tasks;
        for (const auto& task : flat.tasks) { tasks.push_back(shaped(flat.model(task))); }
        const auto made = taskvec::merge(taskvec::cpu{.threads = threads}, options, shaped(flat.model(flat.base)),
            tasks, shaped(flat.output(out)), how);
        if (report) { *report = made; }
        return out;
    }
};

template <class T>
bool same_words(const std::vector<T>& a, const std::vector<T>& b)
{
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

} // namespace testing
