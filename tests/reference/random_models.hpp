// Random models of several tensors for the tests of merges.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <random>
#include <string>
#include <vector>

namespace testing {

/// A base and tasks of storage type T, as a concatenation of tensors "t0", "t1", … of the given sizes.
template <class T>
struct random_models {
    std::vector<std::size_t> sizes;
    std::vector<T> base;
    std::vector<std::vector<T>> tasks;

    /// `levels` > 0 draws from few values, so that magnitudes tie and sums cancel.
    random_models(std::vector<std::size_t> tensor_sizes, std::size_t task_count, unsigned seed, int levels = 0)
        : sizes(std::move(tensor_sizes))
    {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        std::size_t n = 0;
        for (const auto size : sizes) { n += size; }
        const auto draw = [&] {
            const float value = levels
                ? static_cast<float>(static_cast<int>(generator() % static_cast<unsigned>(2 * levels + 1)) - levels)
                : normal(generator);
            return taskvec::narrow<T>(value);
        };
        for (std::size_t i = 0; i < n; ++i) { base.push_back(draw()); }
        for (std::size_t t = 0; t < task_count; ++t) {
            tasks.emplace_back();
            for (std::size_t i = 0; i < n; ++i) { tasks.back().push_back(draw()); }
        }
    }

    [[nodiscard]] taskvec::const_model_ref model(const std::vector<T>& values) const
    {
        taskvec::const_model_ref result;
        std::size_t begin = 0;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            result.insert("t" + std::to_string(i),
                taskvec::as_tensor(taskvec::host_view<const T>{values.data() + begin, sizes[i]}));
            begin += sizes[i];
        }
        return result;
    }
    [[nodiscard]] taskvec::model_ref output(std::vector<T>& values) const
    {
        values.resize(base.size());
        taskvec::model_ref result;
        std::size_t begin = 0;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            result.insert(
                "t" + std::to_string(i), taskvec::as_tensor(taskvec::host_view<T>{values.data() + begin, sizes[i]}));
            begin += sizes[i];
        }
        return result;
    }
    [[nodiscard]] std::vector<taskvec::const_model_ref> task_models() const
    {
        std::vector<taskvec::const_model_ref> result;
        for (const auto& task : tasks) { result.push_back(model(task)); }
        return result;
    }
};

/// The values of a storage type in its arithmetic type.
template <class T>
std::vector<taskvec::arithmetic_type<T>> widen_all(const std::vector<T>& x)
{
    std::vector<taskvec::arithmetic_type<T>> result;
    for (const auto value : x) { result.push_back(taskvec::widen<taskvec::arithmetic_type<T>>(value)); }
    return result;
}

} // namespace testing
