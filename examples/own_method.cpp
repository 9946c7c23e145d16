// The merge method of midpoint.hpp, run typed, by name, from file to file, and on the gpu policy where this is compiled
// for one (docs/gpu.md says how). Each result is compared with that of a plain loop, bit for bit.
//
//     own_method [FOLDER]    # writes models into FOLDER, "own_method_models" without one
// SPDX-License-Identifier: Apache-2.0
#include "midpoint.hpp"

#include <taskvec/formats/checkpoint.hpp>
#if defined(THRUST_DEVICE_SYSTEM) || defined(__CUDACC__)
#include <taskvec/device/methods.hpp>
#define WITH_GPU
#endif

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory_resource>
#include <string>
#include <vector>

namespace {

using numbers = std::vector<float>;

// The method as one would write it without a library. λ is ½ here: its product is exact, so a compiler that fuses it
// with the sum makes the same bits.
numbers plain_loop(const numbers& base, const std::vector<numbers>& tasks, float lambda)
{
    numbers merged(base.size());
    for (std::size_t i = 0; i < base.size(); ++i) {
        float least = tasks[0][i] - base[i], most = least;
        for (const numbers& task : tasks) {
            least = std::min(least, task[i] - base[i]);
            most = std::max(most, task[i] - base[i]);
        }
        merged[i] = base[i] + lambda * (0.5f * (least + most));
    }
    return merged;
}

bool all_the_same = true;

void compare(const char* how, const float* found, const numbers& expected)
{
    std::size_t different = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        different += std::memcmp(&found[i], &expected[i], sizeof(float)) != 0;
    }
    std::printf("%-13s %zu of %zu numbers differ from the plain loop's\n", how, different, expected.size());
    all_the_same = all_the_same && different == 0;
}

// Scratch memory with an upper limit, and what was taken of it at most.
class limited_memory : public std::pmr::memory_resource {
public:
    explicit limited_memory(std::size_t limit)
        : limit_(limit)
    { }

private:
    void* do_allocate(std::size_t bytes, std::size_t alignment) override
    {
        if (bytes > limit_ - used_) {
            taskvec::raise<taskvec::invalid_argument>(
                taskvec::error_code::size_limit, "more scratch memory than allowed");
        }
        used_ += bytes;
        return std::pmr::new_delete_resource()->allocate(bytes, alignment);
    }
    void do_deallocate(void* place, std::size_t bytes, std::size_t alignment) override
    {
        used_ -= bytes;
        std::pmr::new_delete_resource()->deallocate(place, bytes, alignment);
    }
    [[nodiscard]] bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override
    {
        return this == &other;
    }
    std::size_t limit_, used_ = 0;
};

// One tensor, "layer.weight", of `rows` rows.
void save(const std::filesystem::path& path, const numbers& values, std::int64_t rows)
{
    const auto columns = static_cast<std::int64_t>(values.size()) / rows;
    taskvec::safetensors_writer out(path, {{"layer.weight", taskvec::dtype::f32, {rows, columns}}});
    out.write(0, 0, values.data(), values.size() * sizeof(float));
    out.commit();
}

} // namespace

int main(int argc, char** argv)
{
    // A base and three models fine-tuned from it, of numbers that anyone can make again.
    const std::int64_t rows = 300, columns = 1001;
    numbers base(rows * columns);
    std::vector<numbers> tasks(3, base);
    std::uint32_t state = 1;
    const auto next = [&] { return static_cast<float>(state = state * 1664525u + 1013904223u) * 0x1p-31f - 1.0f; };
    for (float& x : base) { x = next(); }
    for (numbers& task : tasks) {
        for (std::size_t i = 0; i < base.size(); ++i) { task[i] = base[i] + 0.01f * next(); }
    }
    const example::midpoint_options options{.lambda = 0.5};
    const numbers expected = plain_loop(base, tasks, 0.5f);
    numbers merged(base.size());

    // Typed: flat views of the caller's own memory.
    taskvec::merge(taskvec::cpu{}, options, base, tasks, merged);
    compare("typed", merged.data(), expected);

    // By name: models are named tensors of any shapes and storage types.
    const auto named = [&](const numbers& values) {
        return taskvec::const_model_ref{{"layer.weight", {values.data(), taskvec::dtype::f32, {rows, columns}}}};
    };
    std::fill(merged.begin(), merged.end(), 0.0f);
    taskvec::merge(taskvec::cpu{}, options, named(base), std::vector{named(tasks[0]), named(tasks[1]), named(tasks[2])},
        taskvec::model_ref{{"layer.weight", {merged.data(), taskvec::dtype::f32, {rows, columns}}}});
    compare("by name", merged.data(), expected);

    // From file to file: inputs are mapped, the output is written as it comes, scratch memory stays within a budget.
    const std::filesystem::path folder = argc > 1 ? argv[1] : "own_method_models";
    std::filesystem::create_directories(folder);
    save(folder / "base.safetensors", base, rows);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
        save(folder / ("task" + std::to_string(t + 1) + ".safetensors"), tasks[t], rows);
    }
    const auto base_file = taskvec::open_model(folder / "base.safetensors");
    std::vector<taskvec::checkpoint> task_files;
    std::vector<taskvec::const_model_ref> task_models;
    for (const char* const name : {"task1.safetensors", "task2.safetensors", "task3.safetensors"}) {
        task_files.push_back(taskvec::open_model(folder / name));
        task_models.push_back(task_files.back().model());
    }
    const taskvec::aligned_models models(&base_file.model(), task_models);
    {
        limited_memory scratch(std::size_t{1} << 20);
        taskvec::safetensors_writer out(folder / "merged.safetensors", models.outputs());
        taskvec::merge(taskvec::cpu{.threads = 2, .memory = &scratch}, options, models, out);
        out.commit();
    }
    const auto merged_file = taskvec::open_model(folder / "merged.safetensors");
    compare("file to file", static_cast<const float*>(merged_file.model().find("layer.weight")->data), expected);

#if defined(WITH_GPU)
    // On the gpu policy: views of device memory, and files that stream through 1 MiB of it.
    const taskvec::gpu device;
    const taskvec::device::buffer<float> base_there(device, base), first(device, tasks[0]), second(device, tasks[1]),
        third(device, tasks[2]);
    taskvec::device::buffer<float> merged_there(device, base.size());
    taskvec::merge(device, options, base_there.view(), std::vector{first.view(), second.view(), third.view()},
        merged_there.view());
    compare("gpu", merged_there.download().data(), expected);
    {
        taskvec::safetensors_writer out(folder / "gpu.safetensors", models.outputs());
        taskvec::merge_streamed(device, options, models, out, {.memory = std::size_t{1} << 20});
        out.commit();
    }
    const auto gpu_file = taskvec::open_model(folder / "gpu.safetensors");
    compare("gpu, streamed", static_cast<const float*>(gpu_file.model().find("layer.weight")->data), expected);
#endif
    return all_the_same ? 0 : 1;
}
