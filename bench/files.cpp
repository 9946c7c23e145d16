// Merges from files to a file beside reading and writing the same bytes with nothing in between; page cache warm,
// nothing synced.
// SPDX-License-Identifier: Apache-2.0
#include "ceiling.hpp"

#include <taskvec/formats/safetensors.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include <benchmark/benchmark.h>

#include <filesystem>
#include <random>

using namespace taskvec;

namespace {

constexpr std::size_t layers = 24, layer_size = std::size_t{1} << 22; // 201 MB of bf16

/// A base and three tasks on disk, in a folder of their own.
class files {
public:
    files()
        : folder_(std::filesystem::temp_directory_path() / ("taskvec-bench-" + std::to_string(::getpid())))
    {
        std::filesystem::create_directory(folder_);
        std::mt19937 generator(1);
        std::normal_distribution<float> normal(0.0f, 0.02f);
        std::vector<float> draws(1u << 16);
        for (auto& draw : draws) { draw = normal(generator); }
        for (std::size_t m = 0; m < 4; ++m) {
            std::vector<std::vector<bf16>> tensors(layers, std::vector<bf16>(layer_size));
            const_model_ref model;
            for (std::size_t l = 0; l < layers; ++l) {
                for (std::size_t i = 0; i < layer_size; ++i) {
                    tensors[l][i] = narrow<bf16>(
                        draws[(i + l * 977) & 0xffff] + (m == 0 ? 0.0f : 0.1f * draws[(i * 7 + m * 131) & 0xffff]));
                }
                model.insert("layers." + std::to_string(10 + l),
                    {tensors[l].data(), dtype::bf16, {1024, layer_size / 1024}, {}, memory_space::host, 0});
            }
            write_safetensors(path(m), model, {}, durability::process);
        }
    }
    files(const files&) = delete;
    files& operator=(const files&) = delete;
    ~files() { std::filesystem::remove_all(folder_); }

    [[nodiscard]] std::filesystem::path path(std::size_t m) const
    {
        return folder_ / (std::to_string(m) + ".safetensors");
    }
    [[nodiscard]] std::filesystem::path output() const { return folder_ / "out.safetensors"; }

private:
    std::filesystem::path folder_;
};

template <class Options>
void merge_files(const files& on_disk, const cpu& policy, const Options& options)
{
    std::vector<safetensors_file> opened;
    for (std::size_t m = 0; m < 4; ++m) { opened.emplace_back(on_disk.path(m)); }
    const const_model_ref base = opened[0].model();
    std::vector<const_model_ref> tasks;
    for (std::size_t m = 1; m < 4; ++m) { tasks.push_back(opened[m].model()); }
    const aligned_models models(&base, tasks);
    safetensors_writer writer(on_disk.output(), models.outputs(), metadata_map{}, durability::process);
    merge(policy, options, models, writer);
    writer.commit();
}

/// Reads every input `walks` times and writes as many bytes as the output has, a MiB at a time, on this many threads.
double plain(const files& on_disk, std::size_t walks, unsigned threads)
{
    constexpr std::size_t piece = std::size_t{1} << 20;
    const std::size_t size = std::filesystem::file_size(on_disk.path(0)), pieces = (size + piece - 1) / piece;
    std::vector<std::vector<std::byte>> buffers(threads, std::vector<std::byte>(piece, std::byte{1}));
    return bench::seconds([&] {
        for (std::size_t walk = 0; walk < walks; ++walk) {
            for (std::size_t m = 0; m < 4; ++m) {
                const detail::descriptor file(::open(on_disk.path(m).c_str(), O_RDONLY | O_CLOEXEC));
                for_each_index(cpu{.threads = threads}, pieces, [&](std::size_t i, std::size_t worker) {
                    benchmark::DoNotOptimize(
                        ::pread(file.get(), buffers[worker].data(), piece, static_cast<off_t>(i * piece)));
                });
            }
        }
        atomic_file out(on_disk.output(), size, durability::process);
        for_each_index(cpu{.threads = threads}, pieces, [&](std::size_t i, std::size_t worker) {
            out.write(i * piece, buffers[worker].data(), std::min(piece, size - i * piece));
        });
        out.commit();
    });
}

template <class Options>
void from_files(benchmark::State& state, const Options& options, std::size_t walks)
{
    static const files on_disk;
    const cpu policy{.threads = static_cast<unsigned>(state.range(0))};
    bench::interleave(
        state, "share of the plain rate", [&] { merge_files(on_disk, policy, options); },
        [&] { return plain(on_disk, walks, policy.threads); });
}

void task_arithmetic_files(benchmark::State& state)
{
    from_files(state, task_arithmetic_options{}, 1);
}
void ties_files(benchmark::State& state)
{
    from_files(state, ties_options{.density = 0.2}, 2);
}

} // namespace

BENCHMARK(task_arithmetic_files)->Arg(1)->Arg(2)->UseManualTime()->Iterations(7);
BENCHMARK(ties_files)->Arg(1)->Arg(2)->UseManualTime()->Iterations(7);
