// Random models in device memory beside the same models on the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../reference/random_models.hpp"

#include <taskvec/device/memory.hpp>

#include <cstring>
#include <string>
#include <vector>

namespace testing {

/// Copies of random models in device memory, and an output there.
template <class T>
class on_device {
public:
    on_device(const taskvec::gpu& policy, const random_models<T>& models)
        : sizes_(models.sizes)
        , base_(policy, models.base)
        , out_(policy, models.base.size())
    {
        out_.clear();
        for (const auto& task : models.tasks) { tasks_.emplace_back(policy, task); }
    }
    [[nodiscard]] taskvec::const_model_ref base() const { return refs<taskvec::const_model_ref>(base_); }
    [[nodiscard]] std::vector<taskvec::const_model_ref> tasks() const
    {
        std::vector<taskvec::const_model_ref> models;
        for (const auto& task : tasks_) { models.push_back(refs<taskvec::const_model_ref>(task)); }
        return models;
    }
    [[nodiscard]] taskvec::device_view<const T> base_view() const { return base_.view(); }
    [[nodiscard]] std::vector<taskvec::device_view<const T>> task_views() const
    {
        std::vector<taskvec::device_view<const T>> views;
        for (const auto& task : tasks_) { views.push_back(task.view()); }
        return views;
    }
    [[nodiscard]] taskvec::model_ref out() const { return refs<taskvec::model_ref>(out_); }
    [[nodiscard]] taskvec::device_view<T> out_view() const { return out_.view(); }
    [[nodiscard]] std::vector<T> result() const { return out_.download(); }

private:
    template <class Model>
    Model refs(const taskvec::device::buffer<T>& values) const
    {
        Model model;
        std::size_t begin = 0;
        for (std::size_t i = 0; i < sizes_.size(); ++i) {
            model.insert(
                "t" + std::to_string(i), taskvec::as_tensor(taskvec::device_view<T>{values.data() + begin, sizes_[i]}));
            begin += sizes_[i];
        }
        return model;
    }
    std::vector<std::size_t> sizes_;
    taskvec::device::buffer<T> base_, out_;
    std::vector<taskvec::device::buffer<T>> tasks_;
};

/// How many elements of two lists differ in their bits; all of them when the lengths do.
template <class T>
std::size_t different(const std::vector<T>& x, const std::vector<T>& y)
{
    if (x.size() != y.size()) { return x.size() + y.size() + 1; }
    std::size_t count = 0;
    for (std::size_t i = 0; i < x.size(); ++i) { count += std::memcmp(&x[i], &y[i], sizeof(T)) != 0; }
    return count;
}

} // namespace testing
