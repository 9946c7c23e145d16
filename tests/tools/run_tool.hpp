// Runs the built tool and catches what it says; models to feed it with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/checkpoint.hpp>

#include "../formats/scratch.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace tools_test {

struct outcome {
    int code = 0; ///< exit code; minus the signal that ended it
    std::string out, err;
};

/// A tool (by default the one that was built) that runs in the background, in `folder`.
class process {
public:
    process(const scratch& folder, const std::vector<std::string>& arguments,
        const std::vector<std::string>& environment = {}, const std::string& tool = TASKVEC_TOOL)
        : out_(folder.path().string() + ".out")
        , err_(folder.path().string() + ".err")
    {
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_addchdir_np(&actions, folder.path().c_str());
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_addopen(&actions, 1, out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
        posix_spawn_file_actions_addopen(&actions, 2, err_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
        std::vector<std::string> words{tool};
        words.insert(words.end(), arguments.begin(), arguments.end());
        std::vector<char*> pointers, variables;
        for (auto& word : words) { pointers.push_back(word.data()); }
        pointers.push_back(nullptr);
        auto values = environment;
        for (char** variable = environ; *variable; ++variable) {
            const std::string name(*variable, std::string(*variable).find('=') + 1);
            bool replaced = false;
            for (const auto& given : environment) { replaced = replaced || given.starts_with(name); }
            if (!replaced) { values.emplace_back(*variable); }
        }
        for (auto& value : values) { variables.push_back(value.data()); }
        variables.push_back(nullptr);
        REQUIRE(::posix_spawn(&child_, tool.c_str(), &actions, nullptr, pointers.data(), variables.data()) == 0);
        posix_spawn_file_actions_destroy(&actions);
    }
    process(const process&) = delete;
    process& operator=(const process&) = delete;
    ~process()
    {
        if (child_) {
            ::kill(child_, SIGKILL);
            ::waitpid(child_, nullptr, 0);
        }
        ::unlink(out_.c_str());
        ::unlink(err_.c_str());
    }
    void send(int signal) const { ::kill(child_, signal); }
    /// True once it has ended; its outcome then comes from wait().
    bool ended()
    {
        siginfo_t info{};
        return ::waitid(P_PID, static_cast<id_t>(child_), &info, WEXITED | WNOHANG | WNOWAIT) == 0
            && info.si_pid == child_;
    }
    outcome wait()
    {
        int status = 0;
        ::waitpid(child_, &status, 0);
        child_ = 0;
        return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(out_), slurp(err_)};
    }

private:
    std::string out_, err_;
    pid_t child_ = 0;
};

inline outcome run(const scratch& folder, const std::vector<std::string>& arguments,
    const std::vector<std::string>& environment = {}, const std::string& tool = TASKVEC_TOOL)
{
    return process(folder, arguments, environment, tool).wait();
}

/// One line, and it is the tool's error.
inline bool is_error_line(const std::string& text)
{
    return text.starts_with("taskvec: error: ") && text.find('\n') == text.size() - 1;
}

/// The same, with the usage of the verb.
inline bool is_usage_error(const std::string& text)
{
    return is_error_line(text) && text.find(" (usage: taskvec ") != std::string::npos && text.ends_with(" --help')\n");
}

/// The tool refuses, says why in one line, and the folder holds what it held before.
inline void refused(
    const scratch& folder, const std::vector<std::string>& arguments, int code, const std::string& because)
{
    const auto before = folder.names();
    const auto result = run(folder, arguments);
    CAPTURE(because);
    CAPTURE(result.err);
    CHECK(result.code == code);
    CHECK(is_error_line(result.err));
    CHECK(result.err.find(because) != std::string::npos);
    CHECK(folder.names() == before);
}

/// A tensor in memory: values as floats that its dtype (f32, bf16, f16) holds exactly.
struct values_tensor {
    taskvec::dtype dtype = taskvec::dtype::f32;
    taskvec::extents shape{};
    std::vector<float> values{};
};
using values_model = std::map<std::string, values_tensor>;

inline float rounded(taskvec::dtype type, float value)
{
    if (type == taskvec::dtype::bf16) { return taskvec::bf16_to_f32(taskvec::f32_to_bf16(value)); }
    if (type == taskvec::dtype::f16) { return taskvec::f16_to_f32(taskvec::f32_to_f16(value)); }
    return value;
}

inline void write_values(
    const std::filesystem::path& path, const values_model& model, const taskvec::metadata_map& metadata = {})
{
    std::vector<taskvec::tensor_spec> specs;
    for (const auto& [name, tensor] : model) { specs.push_back({name, tensor.dtype, tensor.shape}); }
    taskvec::safetensors_writer writer(path, specs, metadata, taskvec::durability::process);
    std::size_t index = 0;
    for (const auto& [name, tensor] : model) {
        REQUIRE(tensor.values.size() == specs[index].size());
        if (tensor.dtype == taskvec::dtype::f32) {
            writer.write(index, 0, tensor.values.data(), 4 * tensor.values.size());
        }
        else {
            std::vector<std::uint16_t> words;
            for (const float value : tensor.values) {
                words.push_back(
                    tensor.dtype == taskvec::dtype::bf16 ? taskvec::f32_to_bf16(value) : taskvec::f32_to_f16(value));
            }
            writer.write(index, 0, words.data(), 2 * words.size());
        }
        ++index;
    }
    writer.commit();
}

inline values_model read_values(const std::filesystem::path& path)
{
    const taskvec::safetensors_file file(path);
    values_model model;
    for (const auto& [name, tensor] : file.model()) {
        auto& entry = model[name];
        entry.dtype = tensor.dtype;
        entry.shape = tensor.shape;
        for (std::size_t i = 0; i < tensor.size(); ++i) {
            if (tensor.dtype == taskvec::dtype::f32) {
                float value;
                std::memcpy(&value, static_cast<const std::byte*>(tensor.data) + 4 * i, 4);
                entry.values.push_back(value);
            }
            else {
                std::uint16_t word;
                std::memcpy(&word, static_cast<const std::byte*>(tensor.data) + 2 * i, 2);
                entry.values.push_back(
                    tensor.dtype == taskvec::dtype::bf16 ? taskvec::bf16_to_f32(word) : taskvec::f16_to_f32(word));
            }
        }
    }
    return model;
}

/// A base of a few tensors (f32, bf16, f16; a scalar and an empty one among them), and a task that differs from it by
/// noise.
inline values_model sample_base(unsigned seed = 1)
{
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    values_model model{{"layers.0.weight", {taskvec::dtype::f32, {17, 31}, {}}},
        {"layers.0.bias", {taskvec::dtype::f16, {31}, {}}}, {"layers.1.weight", {taskvec::dtype::bf16, {64, 65}, {}}},
        {"scale", {taskvec::dtype::f32, {}, {}}}, {"unused", {taskvec::dtype::f32, {0, 4}, {}}}};
    for (auto& [name, tensor] : model) {
        tensor.values.resize(taskvec::element_count(tensor.shape));
        for (auto& value : tensor.values) { value = rounded(tensor.dtype, normal(random)); }
    }
    return model;
}
inline values_model sample_task(const values_model& base, unsigned seed, float noise = 0.1f)
{
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, noise);
    auto model = base;
    for (auto& [name, tensor] : model) {
        for (auto& value : tensor.values) { value = rounded(tensor.dtype, value + normal(random)); }
    }
    return model;
}

/// True when both models hold the same tensors with the same bits (no value here is NaN or a negative zero by
/// accident).
inline bool same(const values_model& a, const values_model& b)
{
    if (a.size() != b.size()) { return false; }
    for (const auto& [name, tensor] : a) {
        const auto other = b.find(name);
        if (other == b.end() || other->second.dtype != tensor.dtype || other->second.shape != tensor.shape
            || other->second.values != tensor.values) {
            return false;
        }
    }
    return true;
}

/// The task vectors of a model, all tensors after one another in name order, in f32.
inline std::vector<float> task_vector(const values_model& base, const values_model& task)
{
    std::vector<float> result;
    for (const auto& [name, tensor] : base) {
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            result.push_back(task.at(name).values[i] - tensor.values[i]);
        }
    }
    return result;
}
/// Base plus lambda times a merged task vector, each product and sum rounded to f32 and the result to its dtype.
inline values_model add_scaled(const values_model& base, const std::vector<float>& vector, float lambda)
{
    auto model = base;
    std::size_t at = 0;
    for (auto& [name, tensor] : model) {
        for (auto& value : tensor.values) {
            const float product = lambda * vector[at++];
            value = rounded(tensor.dtype, value + product);
        }
    }
    return model;
}
/// Zeroes all but the k entries of largest magnitude, the lowest index first among equals.
inline void keep_top(std::vector<float>& vector, double density)
{
    std::vector<std::size_t> order(vector.size());
    for (std::size_t i = 0; i < order.size(); ++i) { order[i] = i; }
    std::stable_sort(order.begin(), order.end(),
        [&](std::size_t a, std::size_t b) { return std::fabs(vector[a]) > std::fabs(vector[b]); });
    const auto k =
        std::max<std::size_t>(1, static_cast<std::size_t>(std::floor(density * static_cast<double>(vector.size()))));
    for (std::size_t i = k; i < order.size(); ++i) { vector[order[i]] = 0; }
}

} // namespace tools_test
