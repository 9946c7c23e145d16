// What differs between two models.
// SPDX-License-Identifier: Apache-2.0
#include "model_diff.hpp"

#include "table.hpp"
#include "words.hpp"

#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

namespace tool {

namespace {

using ordered = nlohmann::ordered_json;

bool computes(const taskvec::const_tensor_ref& tensor)
{
    return taskvec::is_storage(tensor.dtype) || taskvec::is_fp8(tensor.dtype);
}

std::string short_number(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.3g", value);
    return text;
}

} // namespace

nlohmann::ordered_json diff_of(const runner& run, const taskvec::checkpoint& a, const taskvec::checkpoint& b)
{
    ordered result{{"only_in_first", ordered::array()}, {"only_in_second", ordered::array()},
        {"not_comparable", ordered::array()}, {"differ", ordered::array()}, {"equal", 0}};
    std::size_t equal = 0;
    taskvec::const_model_ref first, second;
    for (const auto& [name, tensor] : a.model()) {
        const auto* const other = b.model().find(name);
        if (!other) {
            result["only_in_first"].push_back(name);
            continue;
        }
        const bool both = computes(tensor) && computes(*other) && tensor.shape == other->shape;
        const bool in_memory = !tensor.source && !other->source;
        const bool same = in_memory && tensor.dtype == other->dtype && tensor.shape == other->shape
            && (tensor.bytes() == 0 || std::memcmp(tensor.data, other->data, tensor.bytes()) == 0);
        if (same) { ++equal; }
        else if (both) {
            first.insert(name, tensor);
            second.insert(name, *other);
        }
        else {
            result["not_comparable"].push_back({{"name", name},
                {"first", std::string(taskvec::to_string(tensor.dtype)) + " " + taskvec::to_string(tensor.shape)},
                {"second", std::string(taskvec::to_string(other->dtype)) + " " + taskvec::to_string(other->shape)}});
        }
    }
    for (const auto& [name, tensor] : b.model()) {
        if (!a.model().find(name)) { result["only_in_second"].push_back(name); }
    }
    result["equal"] = equal;
    if (first.empty()) { return result; }
    taskvec::model_options how;
    how.on_nonfinite = taskvec::nonfinite::propagate;
    const taskvec::aligned_models models(&first, {&second, 1}, how);
    std::vector<double> largest(models.tensors().size());
    std::mutex lock;
    const auto sums = taskvec::tensor_sums(run.policy(), models, 4, 0, "compare", [&](auto& rows, double* sum) {
        const auto* const x = rows.base();
        const auto* const y = rows.task(0);
        sum[0] = taskvec::kernels::dot(x, x, rows.size());
        sum[1] = taskvec::kernels::dot(y, y, rows.size());
        sum[2] = taskvec::kernels::dot(x, y, rows.size());
        double most = 0;
        for (std::size_t i = 0; i < rows.size(); ++i) {
            most = std::max(most, std::abs(static_cast<double>(y[i]) - static_cast<double>(x[i])));
        }
        const auto* const change = rows.delta(0);
        sum[3] = taskvec::kernels::dot(change, change, rows.size());
        const std::lock_guard hold(lock);
        auto& place = largest[rows.tensor_index()];
        place = std::max(place, most);
    });
    for (std::size_t i = 0; i < sums.size(); ++i) {
        const double norm = std::sqrt(sums[i][3]), of_first = std::sqrt(sums[i][0]), of_second = std::sqrt(sums[i][1]);
        const auto& name = models.tensors()[i].name;
        if (norm == 0) { // other dtypes, the same numbers
            result["equal"] = ++equal;
            continue;
        }
        ordered one{{"name", name}, {"max", largest[i]}, {"norm", norm}};
        one["relative"] = of_first > 0 ? ordered(norm / of_first) : ordered();
        one["cosine"] = of_first > 0 && of_second > 0 ? ordered(sums[i][2] / (of_first * of_second)) : ordered();
        result["differ"].push_back(std::move(one));
    }
    return result;
}

std::string diff_text(const nlohmann::ordered_json& diff, const taskvec::checkpoint& a, const taskvec::checkpoint& b)
{
    std::vector<std::vector<std::string>> rows{{"name", "max", "norm", "relative", "cosine"}};
    const auto cell = [](const ordered& value, bool cosine) {
        if (value.is_null()) { return std::string("-"); }
        char text[32];
        std::snprintf(text, sizeof text, "%.6f", value.get<double>());
        return cosine ? std::string(text) : short_number(value.get<double>());
    };
    for (const auto& one : diff["differ"]) {
        rows.push_back({printable(one["name"].get<std::string>()), cell(one["max"], false), cell(one["norm"], false),
            cell(one["relative"], false), cell(one["cosine"], true)});
    }
    std::string text;
    if (rows.size() > 1) {
        text = table_text(std::move(rows), {false, true, true, true, true});
        text += "\n";
    }
    for (const auto& one : diff["not_comparable"]) {
        text += printable(one["name"].get<std::string>()) + ": " + one["first"].get<std::string>() + " and "
            + one["second"].get<std::string>() + "\n";
    }
    const auto only = [&](const char* key, const taskvec::checkpoint& model) {
        for (const auto& name : diff[key]) {
            text += "only in '" + printable(model.path().string()) + "': " + printable(name.get<std::string>()) + "\n";
        }
    };
    only("only_in_first", a);
    only("only_in_second", b);
    return text + counted(diff["equal"].get<std::uint64_t>(), "tensor") + " equal, "
        + std::to_string(diff["differ"].size()) + " differ, "
        + std::to_string(diff["only_in_first"].size() + diff["only_in_second"].size()) + " in one model only"
        + (diff["not_comparable"].empty() ? std::string()
                                          : ", " + std::to_string(diff["not_comparable"].size()) + " do not compare")
        + "\n";
}

} // namespace tool
