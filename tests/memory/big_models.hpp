// Models of more than four million elements, of numbers that are cheap to draw.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace testing {

/// Numbers in ±scale.
template <class T>
void draw_numbers(std::vector<T>& x, std::size_t size, float scale, std::uint32_t seed)
{
    x.resize(size);
    for (auto& value : x) {
        seed = seed * 1664525u + 1013904223u;
        value = taskvec::narrow<T>(scale * (static_cast<float>(seed >> 8) / 8388608.0f - 1.0f));
    }
}

/// A base, tasks and an output of storage type T, and models over them.
template <class T>
class big_models {
public:
    explicit big_models(std::size_t task_count,
        std::vector<std::size_t> tensor_sizes = {1'500'000, 1, 64, 1'048'576, 999'983, 651'712, 0, 5'000})
        : tasks(task_count)
        , sizes_(std::move(tensor_sizes))
    {
        std::size_t elements = 0;
        for (const std::size_t size : sizes_) { elements += size; }
        draw_numbers(base, elements, 1.0f, 1);
        out = base;
        base_model = model_over<taskvec::const_model_ref, const T>(base.data());
        out_model = model_over<taskvec::model_ref, T>(out.data());
        for (std::size_t t = 0; t < task_count; ++t) {
            draw_numbers(tasks[t], elements, 1.5f, static_cast<std::uint32_t>(t) + 2);
            task_models.push_back(model_over<taskvec::const_model_ref, const T>(tasks[t].data()));
        }
    }
    big_models(const big_models&) = delete;
    big_models& operator=(const big_models&) = delete;

    [[nodiscard]] std::size_t tensors() const noexcept { return sizes_.size(); }
    /// Tensors of base, tasks and output together.
    [[nodiscard]] std::size_t all_tensors() const noexcept { return sizes_.size() * (tasks.size() + 2); }

    std::vector<T> base, out;
    std::vector<std::vector<T>> tasks;
    taskvec::const_model_ref base_model;
    taskvec::model_ref out_model;
    std::vector<taskvec::const_model_ref> task_models;

private:
    template <class Model, class Element>
    [[nodiscard]] Model model_over(Element* data) const
    {
        Model model;
        for (std::size_t i = 0; i < sizes_.size(); ++i) {
            model.insert("t" + std::to_string(i), taskvec::as_tensor(taskvec::host_view<Element>{data, sizes_[i]}));
            data += sizes_[i];
        }
        return model;
    }
    std::vector<std::size_t> sizes_;
};

} // namespace testing
