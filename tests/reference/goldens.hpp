// Golden cases of tests/data, as tests/data/README.md describes them: the inputs, the options and what is expected.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/safetensors.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace reference {

/// One golden file of merges.
class goldens {
public:
    explicit goldens(const std::string& path)
        : file_(std::string(TASKVEC_TEST_DIR) + "/data/" + path)
        , all_(file_.model())
    { }

    struct golden_case {
        std::string name;
        nlohmann::json row;

        [[nodiscard]] std::string method() const { return row["method"]; }
        [[nodiscard]] const nlohmann::json& options() const { return row["options"]; }
        [[nodiscard]] std::size_t tasks() const { return row["tasks"]; }
        [[nodiscard]] double tolerance() const { return row.value("tolerance", 0.0); }
    };

    /// The cases of one method.
    [[nodiscard]] std::vector<golden_case> cases(const std::string& method) const
    {
        std::vector<golden_case> result;
        for (const std::string name : nlohmann::json::parse(file_.metadata().at("cases"))) {
            golden_case found{name, nlohmann::json::parse(file_.metadata().at(name))};
            if (found.method() == method) { result.push_back(std::move(found)); }
        }
        return result;
    }
    /// The tensors whose names begin with `prefix`, without it.
    [[nodiscard]] taskvec::const_model_ref below(const std::string& prefix) const
    {
        taskvec::const_model_ref result;
        for (const auto& [name, tensor] : all_) {
            if (name.starts_with(prefix)) { result.insert(name.substr(prefix.size()), tensor); }
        }
        return result;
    }
    [[nodiscard]] taskvec::const_model_ref input(const golden_case& which, const std::string& part) const
    {
        return below(std::string(which.row["input"]) + "/input/" + part + "/");
    }
    /// part0, part1, … for each task.
    [[nodiscard]] std::vector<taskvec::const_model_ref> inputs(const golden_case& which, const std::string& part) const
    {
        std::vector<taskvec::const_model_ref> result;
        for (std::size_t t = 0; t < which.tasks(); ++t) { result.push_back(input(which, part + std::to_string(t))); }
        return result;
    }
    [[nodiscard]] taskvec::const_model_ref expected(const golden_case& which) const
    {
        return below(which.name + "/expected/");
    }

private:
    taskvec::safetensors_file file_;
    taskvec::const_model_ref all_;
};

/// A tensor's values in f64.
inline std::vector<double> values_of(const taskvec::const_tensor_ref& tensor)
{
    std::vector<double> result(tensor.size());
    taskvec::visit_storage(tensor.dtype, "golden", [&]<class T>(std::type_identity<T>) {
        for (std::size_t i = 0; i < result.size(); ++i) {
            T value;
            std::memcpy(&value, static_cast<const std::byte*>(tensor.data) + i * sizeof(T), sizeof(T));
            result[i] = taskvec::widen<double>(value);
        }
    });
    return result;
}

/// Memory with the names, shapes and dtypes of a model.
class like {
public:
    explicit like(const taskvec::const_model_ref& model)
    {
        for (const auto& [name, tensor] : model) { memory_.emplace_back(tensor.bytes() + 8); }
        for (std::size_t i = 0; i < model.size(); ++i) {
            model_.insert(model[i].name, {memory_[i].data(), model[i].tensor.dtype, model[i].tensor.shape});
        }
    }
    [[nodiscard]] const taskvec::model_ref& model() const { return model_; }

private:
    std::vector<std::vector<std::byte>> memory_;
    taskvec::model_ref model_;
};

/// The largest difference, as a multiple of the largest expected magnitude of the tensor, over all tensors.
inline double largest_difference(const taskvec::const_model_ref& found, const taskvec::const_model_ref& expected)
{
    double worst = found.size() == expected.size() ? 0 : INFINITY;
    for (const auto& [name, tensor] : expected) {
        const auto* const other = found.find(name);
        if (!other || other->shape != tensor.shape || other->dtype != tensor.dtype) { return INFINITY; }
        const auto a = values_of(*other), b = values_of(tensor);
        double largest = 1e-30, difference = 0;
        for (std::size_t i = 0; i < a.size(); ++i) {
            largest = std::max(largest, std::abs(b[i]));
            difference = std::max(difference, std::abs(a[i] - b[i]));
        }
        worst = std::max(worst, difference / largest);
    }
    return worst;
}

} // namespace reference
