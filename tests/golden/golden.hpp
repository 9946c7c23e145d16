// The golden data of tests/data: cases, input groups, and comparison. See tests/data/README.md for the layout.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/safetensors.hpp>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace golden {

using namespace taskvec;

/// A model with memory of its own.
class owned_model {
public:
    owned_model() = default;
    explicit owned_model(const const_model_ref& like)
    {
        for (const auto& [name, tensor] : like) {
            // Whole doubles, so that every element type is aligned.
            auto& memory = memory_.emplace_back(tensor.bytes() / sizeof(double) + 1, 0.0);
            std::memcpy(memory.data(), tensor.data, tensor.bytes());
            model_.insert(name, {memory.data(), tensor.dtype, tensor.shape});
        }
    }
    [[nodiscard]] const model_ref& model() const noexcept { return model_; }

private:
    std::vector<std::vector<double>> memory_;
    model_ref model_;
};

struct test_case {
    std::string name;
    nlohmann::json about;
    [[nodiscard]] std::string method() const { return about.at("method"); }
    [[nodiscard]] const nlohmann::json& options() const { return about.at("options"); }
    /// 0 where every value must be equal.
    [[nodiscard]] double tolerance() const
    {
        return about.at("agreement") == "exact" ? 0.0 : about.at("tolerance").get<double>();
    }
};

class file {
public:
    explicit file(const std::string& path)
        : file_(std::string(TASKVEC_TEST_DIR) + "/data/" + path)
        , tensors_(file_.model())
    {
        for (const auto& name : nlohmann::json::parse(file_.metadata().at("cases"))) {
            cases_.push_back({name, nlohmann::json::parse(file_.metadata().at(name.get<std::string>()))});
        }
    }
    [[nodiscard]] const std::vector<test_case>& cases() const noexcept { return cases_; }
    /// The tensors whose name starts with `prefix`/, without it.
    [[nodiscard]] const_model_ref part(const std::string& prefix) const
    {
        const_model_ref result;
        for (const auto& [name, tensor] : tensors_) {
            if (name.starts_with(prefix + "/")) { result.insert(name.substr(prefix.size() + 1), tensor); }
        }
        REQUIRE(!result.empty());
        return result;
    }
    [[nodiscard]] const_model_ref base(const test_case& which) const
    {
        return part(which.about.at("input").get<std::string>() + "/input/base");
    }
    [[nodiscard]] std::vector<const_model_ref> tasks(const test_case& which) const
    {
        std::vector<const_model_ref> result;
        for (int t = 0; t < which.about.at("tasks").get<int>(); ++t) {
            result.push_back(part(which.about.at("input").get<std::string>() + "/input/task" + std::to_string(t)));
        }
        return result;
    }

private:
    safetensors_file file_;
    const_model_ref tensors_;
    std::vector<test_case> cases_;
};

/// The tensors of `model` that `names` has too: some cases leave tensors of their group out.
inline const_model_ref restricted(const const_model_ref& model, const const_model_ref& names)
{
    const_model_ref result;
    for (const auto& [name, tensor] : names) {
        (void)tensor;
        REQUIRE(model.find(name));
        result.insert(name, *model.find(name));
    }
    return result;
}

inline std::vector<double> numbers(const const_tensor_ref& tensor, const std::string& name)
{
    return visit_storage(tensor.dtype, name, [&]<class T>(std::type_identity<T>) {
        std::vector<double> values;
        for (const T value : flat_view<T>(tensor, name)) { values.push_back(static_cast<double>(value)); }
        return values;
    });
}

/// Every tensor of `expected` is in `found` with its dtype, shape and values (0 equals −0), or close: |difference| ≤
/// tolerance × the largest expected magnitude of the tensor.
inline void check_equal(
    const const_model_ref& found, const const_model_ref& expected, double tolerance, const std::string& what)
{
    REQUIRE_MESSAGE(found.size() == expected.size(), what);
    for (const auto& [name, tensor] : expected) {
        const std::string tensor_name = name;
        CAPTURE(what);
        CAPTURE(tensor_name);
        const auto* const other = found.find(name);
        REQUIRE(other);
        REQUIRE(other->dtype == tensor.dtype);
        REQUIRE(other->shape == tensor.shape);
        const auto left = numbers(*other, name), right = numbers(tensor, name);
        double scale = 1e-30;
        for (const double value : right) { scale = std::max(scale, std::abs(value)); }
        std::size_t wrong = 0, first = 0;
        for (std::size_t i = 0; i < right.size(); ++i) {
            // Not (a <= b): NaN must not pass.
            const bool fine =
                tolerance == 0.0 ? left[i] == right[i] : std::abs(left[i] - right[i]) <= tolerance * scale;
            if (!fine && wrong++ == 0) { first = i; }
        }
        if (wrong > 0) {
            CAPTURE(first);
            CAPTURE(left[first]);
            CAPTURE(right[first]);
            CHECK(wrong == 0);
        }
        else {
            CHECK(right.size() == left.size());
        }
    }
}

} // namespace golden
