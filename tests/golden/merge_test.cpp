// Merges against the golden cases of tests/data/merge: mergekit, PEFT, ties-merging and the definitions.
// SPDX-License-Identifier: Apache-2.0
#include "golden.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/model_stock.hpp>
#include <taskvec/methods/nuslerp.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/reuse/peru_fft.hpp>
#include <taskvec/reuse/post_pruning.hpp>

#include <map>
#include <optional>
#include <set>
#include <span>

using namespace golden;

namespace {

template <class T>
T value(const nlohmann::json& options, const char* key, T otherwise)
{
    return options.contains(key) ? options.at(key).get<T>() : otherwise;
}

taskvec::scope scope_of(const nlohmann::json& options)
{
    return value<std::string>(options, "scope", "model") == "tensor" ? scope::tensor : scope::model;
}

/// The options of a `ties` case, or nothing where it asks for what the library has not.
std::optional<ties_options> ties_of(const nlohmann::json& options)
{
    if (value<std::string>(options, "election", "") == "frequency") { return std::nullopt; }
    const std::string preset = options.at("preset");
    ties_options result;
    if (preset == "mergekit") { result = ties_options::as_in_mergekit(); }
    else if (preset == "peft") {
        result = ties_options::as_in_peft();
    }
    else if (preset == "ties-merging") {
        result = ties_options::as_in_ties_merging();
    }
    else {
        REQUIRE(preset == "paper");
        result.scope = scope_of(options);
        static const std::map<std::string, zero_sign> signs{
            {"majority", zero_sign::majority}, {"positive", zero_sign::positive}, {"none", zero_sign::none}};
        result.zero_sign = signs.at(options.at("zero_sign"));
    }
    static const std::map<std::string, disjoint_merge> combines{
        {"mean", disjoint_merge::mean}, {"sum", disjoint_merge::sum}, {"max", disjoint_merge::max}};
    result.combine = combines.at(value<std::string>(options, "merge", "mean"));
    result.density = options.at("density");
    result.lambda = options.at("lambda");
    result.weights = options.at("weights").get<std::vector<double>>();
    return result;
}

owned_model dense(const const_model_ref& like, const sparse_model& delta)
{
    owned_model result(like);
    for (const auto& [name, tensor] : result.model()) { std::memset(tensor.data, 0, tensor.bytes()); }
    for (const auto& [name, sparse] : delta) {
        const auto* const tensor = result.model().find(name);
        REQUIRE(tensor);
        std::visit(
            [&]<class A>(const sparse_vector<A>& values) {
                REQUIRE(tensor->dtype == dtype_of<A>);
                for (std::size_t i = 0; i < values.indices.size(); ++i) {
                    CHECK(values.values[i] != 0);
                    static_cast<A*>(tensor->data)[values.indices[i]] = values.values[i];
                }
            },
            sparse);
    }
    return result;
}

/// Every case of a file whose method `run` knows, on one and on three threads and with chunks of odd sizes. Returns how
/// many there were of each method; what `run` answers with false counts as "left out".
template <class Run>
std::map<std::string, int> for_each_case(const std::string& path, const Run& run)
{
    const golden::file file(path);
    std::map<std::string, int> counts;
    for (const auto& which : file.cases()) {
        for (const unsigned threads : {1u, 3u}) {
            model_options how;
            how.chunk = threads == 1 ? 65536 : 64;
            if (!run(file, which, cpu{.threads = threads}, how)) {
                ++counts["left out"];
                break;
            }
            if (threads == 1) { ++counts[which.method()]; }
        }
    }
    return counts;
}

bool merge_case(const golden::file& file, const test_case& which, const cpu& policy, const model_options& how)
{
    const std::string method = which.method();
    static const std::set<std::string> known{
        "ties", "task_arithmetic", "average", "magnitude_prune", "slerp", "model_stock", "model_stock_rows", "nuslerp"};
    if (!known.contains(method)) { return false; }
    const auto expected = file.part(which.name + "/expected");
    const auto& options = which.options();
    owned_model out(expected);
    // What was there before must not shine through.
    for (const auto& [name, tensor] : out.model()) { std::memset(tensor.data, 0x55, tensor.bytes()); }
    std::vector<const_model_ref> tasks;
    for (const auto& task : file.tasks(which)) { tasks.push_back(restricted(task, expected)); }
    const auto base = restricted(file.base(which), expected);
    if (method == "ties") {
        const auto ties = ties_of(options);
        if (!ties) { return false; }
        merge(policy, *ties, base, tasks, out.model(), how);
    }
    else if (method == "task_arithmetic") {
        merge(policy, task_arithmetic_options{options.at("lambda"), options.at("weights")}, base, tasks, out.model(),
            how);
    }
    else if (method == "average") {
        merge(
            policy, average_options{options.at("weights")}, std::span<const const_model_ref>(tasks), out.model(), how);
    }
    else if (method == "nuslerp") {
        const auto& angles = options.at("angles");
        merge(policy,
            nuslerp_options{.weights = options.at("weights"),
                .angles = angles == "rows" ? angles_between::rows
                    : angles == "columns"  ? angles_between::columns
                                           : angles_between::tensors},
            base, tasks, out.model(), how);
    }
    else if (method == "model_stock_rows") {
        merge(policy, model_stock_options{.clamp = options.at("clamp"), .angles = angles_between::rows}, base, tasks,
            out.model(), how);
    }
    else if (method == "slerp") {
        merge(policy, slerp_options{options.at("t")}, base, tasks, out.model(), how);
    }
    else if (method == "model_stock") {
        merge(policy, model_stock_options{options.at("clamp")}, base, tasks, out.model(), how);
    }
    else {
        // PEFT's magnitude_prune: the pruned task vectors, weighted and summed; the base is zero.
        const std::vector<double> weights = options.at("weights");
        std::vector<owned_model> pruned;
        std::vector<const_model_ref> vectors;
        for (const auto& task : tasks) {
            pruned.push_back(dense(base,
                post_pruning(policy, {.density = options.at("density"), .scope = scope::tensor}, base, task, how)));
        }
        for (const auto& model : pruned) { vectors.emplace_back(model.model()); }
        merge(policy, task_arithmetic_options{1.0, weights}, base, vectors, out.model(), how);
    }
    check_equal(out.model(), expected, which.tolerance(), which.name);
    return true;
}

bool pruning_case(const golden::file& file, const test_case& which, const cpu& policy, const model_options& how)
{
    if (which.method() != "post_pruning" && which.method() != "peru_fft") { return false; }
    const auto base = file.base(which);
    const auto& options = which.options();
    const post_pruning_options pruning{.density = options.at("density"), .scope = scope_of(options)};
    if (which.method() == "post_pruning") {
        const auto expected = file.part(which.name + "/delta");
        const sparse_model delta = post_pruning(policy, pruning, base, file.tasks(which).at(0), how);
        CHECK_MESSAGE(kept_entries(delta) == options.at("kept").get<std::uint64_t>(), which.name);
        check_equal(dense(expected, delta).model(), expected, 0.0, which.name + " delta");

        owned_model live(base);
        const auto saved = apply(policy, delta, live.model());
        check_equal(live.model(), file.part(which.name + "/expected"), 0.0, which.name);
        undo(policy, delta, saved, live.model());
        check_equal(live.model(), base, 0.0, which.name + " undone");
        return true;
    }
    const auto expected = file.part(which.name + "/expected/merged");
    const auto tasks = file.tasks(which);
    owned_model merged(expected);
    std::vector<sparse_model> deltas;
    if (options.at("merge") == "ties") {
        deltas = peru_fft(policy,
            ties_options{.density = options.at("merge_density"),
                .lambda = options.at("lambda"),
                .weights = options.at("weights")},
            pruning, base, tasks, merged.model(), how);
    }
    else {
        deltas = peru_fft(policy, task_arithmetic_options{options.at("lambda"), options.at("weights")}, pruning, base,
            tasks, merged.model(), how);
    }
    check_equal(merged.model(), expected, 0.0, which.name);
    REQUIRE(deltas.size() == tasks.size());
    for (std::size_t t = 0; t < tasks.size(); ++t) {
        CHECK_MESSAGE(kept_entries(deltas[t]) == options.at("kept").at(t).get<std::uint64_t>(), which.name);
        const auto saved = apply(policy, deltas[t], merged.model());
        check_equal(merged.model(), file.part(which.name + "/expected/task" + std::to_string(t)), 0.0,
            which.name + " task " + std::to_string(t));
        undo(policy, deltas[t], saved, merged.model());
        check_equal(merged.model(), expected, 0.0, which.name + " undone");
    }
    return true;
}

} // namespace

TEST_CASE("merges are what mergekit makes")
{
    const auto counts = for_each_case("merge/mergekit.safetensors", merge_case);
    CHECK(counts.at("ties") == 30);
    CHECK(counts.at("task_arithmetic") == 10);
    CHECK(counts.at("average") == 6);
    CHECK(counts.at("slerp") == 11);
    CHECK(counts.at("model_stock") == 4);
    CHECK(counts.at("model_stock_rows") == 2);
    CHECK(counts.at("nuslerp") == 6);
}

TEST_CASE("merges are what PEFT makes")
{
    const auto counts = for_each_case("merge/peft.safetensors", merge_case);
    CHECK(counts.at("ties") == 20);
    CHECK(counts.at("task_arithmetic") == 8);
    CHECK(counts.at("magnitude_prune") == 4);
    CHECK(counts.at("left out") == 8); // majority by frequency
}

TEST_CASE("merges are what ties-merging makes")
{
    const auto counts = for_each_case("merge/ties_merging.safetensors", merge_case);
    CHECK(counts.at("ties") == 39);
}

TEST_CASE("merges are the definitions, element for element")
{
    const auto counts = for_each_case("merge/definition.safetensors", merge_case);
    CHECK(counts.at("ties") == 46);
    CHECK(counts.at("task_arithmetic") == 14);
    CHECK(counts.at("average") == 10);
}

TEST_CASE("pruned models and PERU-FFT are the definitions, element for element")
{
    const auto counts = for_each_case("merge/definition.safetensors", pruning_case);
    CHECK(counts.at("post_pruning") == 22);
    CHECK(counts.at("peru_fft") == 6);
}
