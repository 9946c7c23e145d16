// What differs between two models.
// SPDX-License-Identifier: Apache-2.0
#include "model_diff.hpp"

#include "table.hpp"
#include "words.hpp"

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

namespace tool {

namespace {

using ordered = nlohmann::ordered_json;

bool computes(const taskvec::const_tensor_ref& tensor)
{
    return taskvec::is_storage(tensor.dtype) || taskvec::is_fp8(tensor.dtype);
}

/// Whether one of two tensors has scales and the other is bare codes, which are no numbers by themselves.
bool lost_scales(const taskvec::const_tensor_ref& a, const taskvec::const_tensor_ref& b)
{
    return (a.source && !b.source && taskvec::is_fp8(b.dtype)) || (b.source && !a.source && taskvec::is_fp8(a.dtype));
}

/// What a tensor's numbers are stored as.
std::string storage_of(const taskvec::const_tensor_ref& tensor)
{
    return tensor.source ? "codes with scales" : std::string(taskvec::to_string(tensor.dtype));
}
/// How a tensor is stored, for one that another cannot be compared with.
std::string kind_of(const taskvec::const_tensor_ref& tensor)
{
    return storage_of(tensor) + " " + taskvec::to_string(tensor.shape);
}

std::string short_number(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.3g", value);
    return std::isnan(value) ? "nan" : text; // not -nan
}

/// A whole number of any type.
struct whole_number {
    bool negative = false;
    std::uint64_t magnitude = 0;
};
template <class T>
whole_number whole_at(const std::byte* values, std::size_t index)
{
    T value;
    std::memcpy(&value, values + index * sizeof(T), sizeof(T));
    if constexpr (std::is_signed_v<T>) {
        if (value < 0) { return {true, 0 - static_cast<std::uint64_t>(value)}; }
    }
    return {false, static_cast<std::uint64_t>(value)};
}
using whole_reader = whole_number (*)(const std::byte*, std::size_t);
/// How integers and truths of a dtype are read; null for any other dtype.
whole_reader whole_reader_of(taskvec::dtype type)
{
    whole_reader found = type == taskvec::dtype::boolean ? whole_at<std::uint8_t> : nullptr;
    taskvec::visit_integer(type, [&]<class N>(std::type_identity<N>) { found = whole_at<N>; });
    return found;
}

/// |y − x|: the difference is exact, and rounded once.
double distance(const whole_number& x, const whole_number& y)
{
    if (x.negative == y.negative) {
        return static_cast<double>(x.magnitude > y.magnitude ? x.magnitude - y.magnitude : y.magnitude - x.magnitude);
    }
    return static_cast<double>(x.magnitude) + static_cast<double>(y.magnitude);
}
double value_of(const whole_number& x)
{
    return x.negative ? -static_cast<double>(x.magnitude) : static_cast<double>(x.magnitude);
}

/// What is equal in value differs by 0, NaN and infinity too.
double difference_of(double x, double y)
{
    return x == y || (std::isnan(x) && std::isnan(y)) ? 0.0 : y - x;
}
/// The larger magnitude; NaN is larger than all.
double larger(double x, double y)
{
    return std::isnan(x) || std::isnan(y) ? std::numeric_limits<double>::quiet_NaN() : std::max(x, y);
}

/// Sums and largest magnitudes of a tensor in both models and of the difference (of those of the models only whether
/// they are 0, and finite, counts); square sums in units of a power of two, 2^0 unless squares are beyond f64.
struct comparison {
    double squares[3] = {}; ///< of a, b, b − a
    double dot = 0;
    double largest[3] = {};
    int power[3] = {};

    void add(double x, double y, double change)
    {
        squares[0] += x * x;
        squares[1] += y * y;
        squares[2] += change * change;
        dot += x * y;
        const double values[] = {x, y, change};
        for (std::size_t k = 0; k < 3; ++k) { largest[k] = larger(largest[k], std::abs(values[k])); }
    }
    /// Whether a square lost something to the range of f64.
    [[nodiscard]] bool lost() const
    {
        for (std::size_t k = 0; k < 3; ++k) {
            if (largest[k] != 0 && std::isfinite(largest[k]) && !(squares[k] >= 0x1p-900 && squares[k] <= 0x1p1000)) {
                return true;
            }
        }
        return false;
    }
    [[nodiscard]] double norm(std::size_t which) const { return std::scalbn(std::sqrt(squares[which]), power[which]); }
    [[nodiscard]] ordered row(const std::string& name) const
    {
        ordered one{{"name", name}, {"max", largest[2]}, {"norm", norm(2)}};
        const double first = std::sqrt(squares[0]), second = std::sqrt(squares[1]);
        one["relative"] =
            largest[0] != 0 ? ordered(std::scalbn(std::sqrt(squares[2]) / first, power[2] - power[0])) : ordered();
        one["cosine"] =
            largest[0] != 0 && largest[1] != 0 ? ordered(std::clamp(dot / (first * second), -1.0, 1.0)) : ordered();
        return one;
    }
};

comparison compare_whole(
    const taskvec::const_tensor_ref& a, const taskvec::const_tensor_ref& b, whole_reader of_a, whole_reader of_b)
{
    comparison result;
    const auto* const x = static_cast<const std::byte*>(a.data);
    const auto* const y = static_cast<const std::byte*>(b.data);
    for (std::size_t i = 0, size = a.size(); i < size; ++i) {
        const auto first = of_a(x, i), second = of_b(y, i);
        result.add(value_of(first), value_of(second), distance(first, second));
    }
    return result;
}

/// The largest power of two in a number; that of 0 is below all.
int power_of(double value)
{
    return value == 0 || !std::isfinite(value) ? std::numeric_limits<int>::min() : std::ilogb(value);
}

/// A block of numbers in f64.
template <class A>
comparison compare_block(const A* x, const A* y, std::size_t size)
{
    comparison result;
    if constexpr (std::is_same_v<A, float>) { // whose squares f64 holds; what is not finite is looked at one by one
        constexpr std::size_t lanes = 8;
        double sums[lanes] = {}, most[lanes] = {};
        const auto step = [&](std::size_t i, std::size_t lane) {
            const double change = static_cast<double>(y[i]) - static_cast<double>(x[i]);
            sums[lane] += change * change;
            most[lane] = std::max(most[lane], std::abs(change));
        };
        std::size_t i = 0;
        for (; i + lanes <= size; i += lanes) {
            for (std::size_t lane = 0; lane < lanes; ++lane) { step(i + lane, lane); }
        }
        for (; i < size; ++i) { step(i, 0); }
        const taskvec::cpu here{.threads = 1}; // blocks are shared among threads already
        const taskvec::host_view<const A> first(x, size), second(y, size);
        result.squares[0] = taskvec::dot(here, first, first);
        result.squares[1] = taskvec::dot(here, second, second);
        result.dot = taskvec::dot(here, first, second);
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            result.squares[2] += sums[lane];
            result.largest[2] = std::max(result.largest[2], most[lane]);
        }
        for (std::size_t k = 0; k < 2; ++k) { result.largest[k] = std::sqrt(result.squares[k]); } // 0 where all are
        if (std::isfinite(result.squares[0] + result.squares[1] + result.squares[2])) { return result; }
        result = {};
    }
    for (std::size_t i = 0; i < size; ++i) {
        const auto first = static_cast<double>(x[i]), second = static_cast<double>(y[i]);
        result.add(first, second, difference_of(first, second));
    }
    return result;
}

/// All tensors of aligned models, in f64. `again`: those that compare() said have lost something, each in units of its
/// largest numbers; their differences may be beyond f64.
std::vector<comparison> compare(
    const runner& run, const taskvec::aligned_models& models, const std::vector<comparison>* again = nullptr)
{
    std::vector<comparison> results(models.tensors().size());
    if (again) {
        for (std::size_t i = 0; i < results.size(); ++i) {
            for (std::size_t k = 0; k < 3; ++k) {
                results[i].power[k] = std::max(power_of((*again)[i].largest[k]), -1074);
            }
        }
    }
    std::mutex lock;
    const auto sums = taskvec::tensor_sums(run.policy(), models, 4, 0, "compare", [&](auto& rows, double* sum) {
        const auto* const x = rows.base();
        const auto* const y = rows.task(0);
        auto& whole = results[rows.tensor_index()];
        comparison part;
        if (!again) { part = compare_block(x, y, rows.size()); }
        for (std::size_t i = 0; again && i < rows.size(); ++i) {
            const auto first = static_cast<double>(x[i]), second = static_cast<double>(y[i]);
            part.add(std::scalbn(first, -whole.power[0]), std::scalbn(second, -whole.power[1]),
                std::scalbn(difference_of(first, second), -whole.power[2]));
        }
        std::copy_n(part.squares, 3, sum);
        sum[3] = part.dot;
        const std::lock_guard hold(lock);
        for (std::size_t k = 0; k < 3; ++k) { whole.largest[k] = larger(whole.largest[k], part.largest[k]); }
    });
    for (std::size_t i = 0; i < results.size(); ++i) {
        std::copy_n(sums[i].data(), 3, results[i].squares);
        results[i].dot = sums[i][3];
        if (again) { std::copy_n((*again)[i].largest, 3, results[i].largest); }
    }
    return results;
}

/// compare(), and again where something is out of range.
std::map<std::string, comparison> compare_in_range(const runner& run, const taskvec::const_model_ref& a,
    const taskvec::const_model_ref& b, const taskvec::model_options& how)
{
    const taskvec::aligned_models models(&a, {&b, 1}, how);
    const auto results = compare(run, models);
    std::map<std::string, comparison> found;
    taskvec::const_model_ref first, second;
    std::vector<comparison> before;
    for (std::size_t i = 0; i < results.size(); ++i) {
        const auto& name = models.tensors()[i].name;
        found[name] = results[i];
        if (!results[i].lost()) { continue; }
        first.insert(name, *a.find(name));
        second.insert(name, *b.find(name));
        before.push_back(results[i]);
    }
    if (before.empty()) { return found; }
    const taskvec::aligned_models lossy(&first, {&second, 1}, how);
    const auto scaled = compare(run, lossy, &before);
    for (std::size_t i = 0; i < scaled.size(); ++i) { found[lossy.tensors()[i].name] = scaled[i]; }
    return found;
}

} // namespace

nlohmann::ordered_json diff_of(const runner& run, const taskvec::checkpoint& a, const taskvec::checkpoint& b)
{
    ordered result{{"only_in_first", ordered::array()}, {"only_in_second", ordered::array()},
        {"not_comparable", ordered::array()}, {"differ", ordered::array()}, {"dtypes_differ", ordered::array()},
        {"equal", 0}};
    std::size_t equal = 0;
    taskvec::const_model_ref first, second;
    std::map<std::string, ordered> rows; // of what differs, by name
    for (const auto& [name, tensor] : a.model()) {
        const auto* const other = b.model().find(name);
        if (!other) {
            result["only_in_first"].push_back(name);
            continue;
        }
        const bool both =
            computes(tensor) && computes(*other) && tensor.shape == other->shape && !lost_scales(tensor, *other);
        const bool in_memory = !tensor.source && !other->source;
        const bool same = in_memory && tensor.dtype == other->dtype && tensor.shape == other->shape
            && (tensor.bytes() == 0 || std::memcmp(tensor.data, other->data, tensor.bytes()) == 0);
        const auto of_first = whole_reader_of(tensor.dtype), of_second = whole_reader_of(other->dtype);
        const bool both_whole = in_memory && of_first && of_second && tensor.shape == other->shape;
        if ((both || both_whole) && storage_of(tensor) != storage_of(*other)) {
            result["dtypes_differ"].push_back(
                {{"name", name}, {"first", storage_of(tensor)}, {"second", storage_of(*other)}});
        }
        if (same) { ++equal; }
        else if (both) {
            first.insert(name, tensor);
            second.insert(name, *other);
        }
        else if (both_whole) {
            const auto found = compare_whole(tensor, *other, of_first, of_second);
            if (found.largest[2] == 0) { ++equal; }
            else {
                rows.emplace(name, found.row(name));
            }
        }
        else if (in_memory && tensor.dtype == other->dtype && tensor.shape == other->shape) {
            rows.emplace(name, // numbers that nothing here computes with
                ordered{
                    {"name", name}, {"max", nullptr}, {"norm", nullptr}, {"relative", nullptr}, {"cosine", nullptr}});
        }
        else {
            result["not_comparable"].push_back(
                {{"name", name}, {"first", kind_of(tensor)}, {"second", kind_of(*other)}});
        }
    }
    for (const auto& [name, tensor] : b.model()) {
        if (!a.model().find(name)) { result["only_in_second"].push_back(name); }
    }
    if (!first.empty()) {
        taskvec::model_options how;
        how.on_nonfinite = taskvec::nonfinite::propagate;
        for (const auto& [name, found] : compare_in_range(run, first, second, how)) {
            if (found.largest[2] == 0) { ++equal; } // other dtypes, the same numbers
            else {
                rows.emplace(name, found.row(name));
            }
        }
    }
    for (auto& [name, row] : rows) { result["differ"].push_back(std::move(row)); }
    result["equal"] = equal;
    return result;
}

std::string diff_text(const nlohmann::ordered_json& diff, const taskvec::checkpoint& a, const taskvec::checkpoint& b)
{
    std::vector<std::vector<std::string>> rows{{"name", "max", "norm", "relative", "cosine"}};
    const auto cell = [](const ordered& value, bool cosine) {
        if (value.is_null()) { return std::string("-"); }
        const auto number = value.get<double>();
        if (!cosine || std::isnan(number)) { return short_number(number); }
        char text[32];
        std::snprintf(text, sizeof text, "%.6f", number);
        return std::string(text);
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
    std::map<std::pair<std::string, std::string>, std::vector<std::string>> stored; // names, by the two dtypes
    for (const auto& one : diff["dtypes_differ"]) {
        stored[{one["first"].get<std::string>(), one["second"].get<std::string>()}].push_back(
            printable(one["name"].get<std::string>()));
    }
    for (const auto& [dtypes, names] : stored) {
        text += dtypes.first + " in '" + printable(a.path().string()) + "', " + dtypes.second + " in '"
            + printable(b.path().string()) + "': " + names.front()
            + (names.size() > 1 ? " and " + counted(names.size() - 1, "other") : std::string()) + "\n";
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
        + (diff["dtypes_differ"].empty() ? std::string()
                                         : "; " + counted(diff["dtypes_differ"].size(), "tensor") + " of two dtypes")
        + "\n";
}

} // namespace tool
