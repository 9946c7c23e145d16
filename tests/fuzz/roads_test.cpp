// All roads give the same bits: packs of every width, any number of threads, any budget of memory, any chunk, models at
// any address, in memory and from a file to a file, typed and by name; with TASKVEC_ROADS_OMP (scripts/fuzz, where
// Thrust is) also the gpu policy on host threads.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/safetensors.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#if defined(TASKVEC_ROADS_OMP)
#include <taskvec/device/methods.hpp>
#endif

#include <cmath>
#include <filesystem>
#include <vector>

namespace {

using namespace taskvec;

/// Models whose numbers, shapes and dtypes come from an input.
struct drawn_models {
    std::vector<tensor_spec> specs;
    std::vector<std::vector<std::vector<std::byte>>> bytes; // of each model (the base first), of each tensor
    std::size_t shift;

    drawn_models(fuzz::numbers& from, std::size_t models)
        : bytes(models)
        , shift(from.below(3))
    {
        constexpr dtype types[] = {dtype::f32, dtype::bf16, dtype::f16, dtype::f64};
        const std::size_t tensors = 1 + from.below(3);
        for (std::size_t i = 0; i < tensors; ++i) {
            const auto elements = static_cast<std::int64_t>(1 + from.below(from.byte() % 4 == 0 ? 700 : 40));
            // One alone is called as the typed road calls it: what is drawn depends on the name.
            auto name = tensors == 1 ? std::string("values") : "t" + std::to_string(i);
            specs.push_back({std::move(name), types[from.below(4)], {elements}});
        }
        for (auto& model : bytes) {
            for (const auto& spec : specs) {
                auto& tensor = model.emplace_back(spec.bytes() + 64);
                // Few values, so that magnitudes tie and sums cancel, and powers of two of all sizes.
                visit_storage(spec.dtype, spec.name, [&]<class S>(std::type_identity<S>) {
                    std::uint32_t state = from.byte() + 256u * from.byte() + 1u;
                    for (std::size_t k = 0; k < spec.size(); ++k) {
                        if (k < 24) { state = state * 31u + from.byte(); }
                        else {
                            state = state * 1664525u + 1013904223u;
                        }
                        const int kind = static_cast<int>(state >> 28);
                        const auto mantissa = static_cast<float>(static_cast<int>(state >> 8 & 7u) - 3);
                        const float value =
                            kind == 0 ? std::ldexp(mantissa, static_cast<int>(state >> 12 & 31u) - 20) : mantissa / 8;
                        const S stored = narrow<S>(value);
                        std::memcpy(tensor.data() + shift + k * sizeof(S), &stored, sizeof stored);
                    }
                });
            }
        }
    }
    [[nodiscard]] const_model_ref model(std::size_t m) const
    {
        const_model_ref result;
        for (std::size_t i = 0; i < specs.size(); ++i) {
            result.insert(
                specs[i].name, {bytes[m][i].data() + shift, specs[i].dtype, specs[i].shape, {}, memory_space::host, 0});
        }
        return result;
    }
};

using result = std::vector<std::vector<std::byte>>;

template <class Options>
result in_memory(const cpu& policy, const Options& options, const const_model_ref& base,
    const std::vector<const_model_ref>& tasks, const model_options& how, const std::vector<tensor_spec>& specs)
{
    result bytes;
    model_ref out;
    for (const auto& spec : specs) {
        auto& tensor = bytes.emplace_back(spec.bytes());
        out.insert(spec.name, {tensor.data(), spec.dtype, spec.shape, {}, memory_space::host, 0});
    }
    merge(policy, options, base, tasks, out, how);
    return bytes;
}

/// From files to a file; nothing of it is forced to a disk.
template <class Options>
result by_file(const cpu& policy, const Options& options, const drawn_models& drawn, const model_options& how)
{
    static const auto folder = std::filesystem::temp_directory_path() / ("taskvec-roads-" + std::to_string(::getpid()));
    std::filesystem::create_directory(folder);
    std::vector<safetensors_file> files;
    for (std::size_t m = 0; m < drawn.bytes.size(); ++m) {
        const auto path = folder / std::to_string(m);
        write_safetensors(path, drawn.model(m), {}, durability::process);
        files.emplace_back(path);
    }
    std::vector<const_model_ref> tasks;
    for (std::size_t m = 1; m < files.size(); ++m) { tasks.push_back(files[m].model()); }
    const const_model_ref base = files[0].model();
    const aligned_models models(&base, tasks, how);
    {
        safetensors_writer out(folder / "out", models.outputs(), metadata_map{}, durability::process);
        merge(policy, options, models, out);
        out.commit();
    }
    result bytes;
    const safetensors_file merged(folder / "out");
    for (const auto& [name, tensor] : merged.model()) {
        const auto* const data = static_cast<const std::byte*>(tensor.data);
        bytes.emplace_back(data, data + tensor.bytes(name));
    }
    std::filesystem::remove_all(folder);
    return bytes;
}

template <class Options>
void all_roads(fuzz::numbers& from, const Options& options, const drawn_models& drawn)
{
    std::vector<const_model_ref> tasks;
    for (std::size_t m = 1; m < drawn.bytes.size(); ++m) { tasks.push_back(drawn.model(m)); }
    const auto base = drawn.model(0);
    limit_instruction_set(instruction_set::scalar);
    const auto expected = in_memory(cpu{.threads = 1}, options, base, tasks, {}, drawn.specs);
    model_options how;
    how.chunk = 64 * (1 + from.below(8));
    how.memory = from.byte() % 2 == 0 ? std::size_t{256} << 20 : 1 + from.below(9000);
    const cpu policy{.threads = static_cast<unsigned>(1 + from.below(3))};
    for (const auto set :
        {instruction_set::scalar, instruction_set::baseline, instruction_set::avx2, instruction_set::avx512}) {
        limit_instruction_set(set);
        fuzz::expect(in_memory(policy, options, base, tasks, how, drawn.specs) == expected,
            "another width of pack, number of threads, chunk or budget gave other bits");
    }
    if (from.byte() % 8 == 0) {
        fuzz::expect(by_file(policy, options, drawn, how) == expected, "the road by files gave other bits");
    }
#if defined(TASKVEC_ROADS_OMP)
    if (from.byte() % 4 == 0) {
        result bytes;
        model_ref out;
        for (const auto& spec : drawn.specs) {
            auto& tensor = bytes.emplace_back(spec.bytes());
            out.insert(spec.name, {tensor.data(), spec.dtype, spec.shape, {}, memory_space::host, 0});
        }
        merge_streamed(
            gpu{}, options, base, tasks, out, {}, {.memory = std::size_t{1} << (from.byte() % 24), .host = policy});
        fuzz::expect(bytes == expected, "the gpu policy on host threads gave other bits");
    }
#endif
    // Typed: one tensor of floats, in spans.
    if (drawn.specs.size() == 1 && drawn.specs[0].dtype == dtype::f32) {
        const std::size_t n = drawn.specs[0].size();
        std::vector<std::vector<float>> values(drawn.bytes.size(), std::vector<float>(n));
        for (std::size_t m = 0; m < values.size(); ++m) {
            std::memcpy(values[m].data(), drawn.bytes[m][0].data() + drawn.shift, n * sizeof(float));
        }
        const std::vector<std::span<const float>> views(values.begin() + 1, values.end());
        std::vector<float> out(n);
        merge(policy, options, std::span<const float>(values[0]), views, std::span<float>(out), how);
        fuzz::expect(std::memcmp(out.data(), expected[0].data(), n * sizeof(float)) == 0,
            "the typed road gave other bits than the one by name");
    }
}

} // namespace

TASKVEC_FUZZ_TARGET(roads)
{
    fuzz::numbers from(data, size);
    const auto method = from.below(7);
    const std::size_t tasks = method == 6 ? 2 : 1 + from.below(4);
    const double density = static_cast<double>(1 + from.below(100)) / 100, lambda = 0.25 * (1.0 + from.byte() % 8);
    std::vector<double> weights;
    for (std::size_t t = 0; t < tasks; ++t) { weights.push_back(0.25 + 0.25 * (from.byte() % 5)); }
    const drawn_models drawn(from, tasks + 1);
    fuzz::read([&] {
        switch (method) {
        case 0: all_roads(from, average_options{weights}, drawn); break;
        case 1: all_roads(from, task_arithmetic_options{.lambda = lambda, .weights = weights}, drawn); break;
        case 2: all_roads(from, ties_options{.density = density, .lambda = lambda}, drawn); break;
        case 3:
            all_roads(from, ties_options{.density = density, .lambda = lambda, .trim = trim_rule::reach_next}, drawn);
            break;
        case 4: all_roads(from, dare_options{}, drawn); break;
        case 5: all_roads(from, breadcrumbs_options{.density = std::min(density, 0.9)}, drawn); break;
        default: all_roads(from, slerp_options{}, drawn); break;
        }
    });
    limit_instruction_set(supported_instruction_set());
}
