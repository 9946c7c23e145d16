// The recipes of docs/cookbook.md, one after the other, on models that are made here.
//
//     cookbook [FOLDER]    # writes into FOLDER, "cookbook_models" without one
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/fuse.hpp>

#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/delta.hpp>
#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/formats/peft.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/reuse/peru_lora.hpp>
#include <taskvec/reuse/post_pruning.hpp>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace fs = std::filesystem;

namespace {

// [merge]
void merge_checkpoints(const fs::path& folder)
{
    // Opening maps the files; shards and single files look the same.
    const auto base = taskvec::open_model(folder / "base");
    const auto french = taskvec::open_model(folder / "french"), code = taskvec::open_model(folder / "code");
    const std::vector<taskvec::const_model_ref> tasks{french.model(), code.model()};

    // Lining them up checks names, shapes and dtypes, before anything is written.
    const taskvec::aligned_models models(&base.model(), tasks);
    taskvec::sharded_writer out(folder / "merged", models.outputs(), 5'000'000'000);
    taskvec::merge(taskvec::cpu{}, taskvec::ties_options{.density = 0.2, .lambda = 1.0}, models, out);
    out.commit(); // until here the directory is not there
}
// [end]

// [fuse]
void fuse_adapter(const fs::path& folder)
{
    const auto base = taskvec::open_model(folder / "base");
    const auto adapter = taskvec::read_peft(folder / "adapter");

    taskvec::adapted_model changes;
    for (const auto& [module, update] : adapter.updates) { changes.add(base.model(), module + ".weight", update); }

    const taskvec::aligned_models models(&base.model(), {&base.model(), 1});
    taskvec::sharded_writer out(folder / "fused", models.outputs(), 5'000'000'000);
    taskvec::fuse(taskvec::cpu{}, base.model(), changes, out);
    out.commit();
}
// [end]

// [compress]
void compress_adapter(const fs::path& folder)
{
    auto adapter = taskvec::read_peft(folder / "adapter");
    auto served = taskvec::peru_lora(taskvec::cpu{}, adapter.updates, {.rank = {.rank = 4}});
    for (const auto& layer : served.layers) {
        std::printf("%s: rank %zu to %zu, relative error %.3f\n", layer.name.c_str(), layer.rank_before, layer.rank,
            layer.relative_error());
    }
    adapter.updates = std::move(served.adapter);
    taskvec::write_peft(folder / "adapter-r4", adapter);
}
// [end]

// [prune]
void keep_what_matters(const fs::path& folder, const std::string& task)
{
    const auto base = taskvec::open_model(folder / "base"), tuned = taskvec::open_model(folder / task);
    const std::vector<taskvec::const_model_ref> tasks{tuned.model()};
    const taskvec::aligned_models models(&base.model(), tasks);

    // The tenth of the task vector that is largest, over the whole model.
    taskvec::delta_writer out(
        folder / (task + ".delta.safetensors"), taskvec::fingerprint(taskvec::cpu{}, base.model()));
    taskvec::post_pruning(taskvec::cpu{}, {.density = 0.1}, models, out);
    out.commit();
}
// [end]

// The model of a file in memory that may be written.
struct live_model {
    explicit live_model(const taskvec::const_model_ref& stored)
    {
        for (const auto& [name, tensor] : stored) {
            auto& bytes = memory[name];
            bytes.resize(tensor.bytes(name));
            std::memcpy(bytes.data(), tensor.data, bytes.size());
            model.insert(name, {bytes.data(), tensor.dtype, tensor.shape});
        }
    }
    std::map<std::string, std::vector<std::byte>> memory;
    taskvec::model_ref model;
};

// [serve]
void serve_tasks(const fs::path& folder)
{
    const auto base = taskvec::open_model(folder / "base");
    live_model live(base.model()); // the weights that the runtime computes with
    const taskvec::delta_file french(folder / "french.delta.safetensors"), code(folder / "code.delta.safetensors");
    const taskvec::cpu policy;
    taskvec::check_base(policy, french.base_fingerprint(), base.model(), "french.delta.safetensors");

    for (const taskvec::delta_file* task : {&french, &code, &french}) {
        // Room for the words that a task replaces; a runtime keeps it from task to task.
        std::vector<double> room(taskvec::saved_bytes(task->parts(), live.model) / 8);
        const std::span<std::byte> saved = std::as_writable_bytes(std::span(room));
        taskvec::apply(policy, task->parts(), live.model, saved);
        std::printf("%s is on: fingerprint %016llx\n", task->path().stem().stem().c_str(),
            static_cast<unsigned long long>(taskvec::fingerprint(policy, live.model)));
        taskvec::undo(policy, task->parts(), saved, live.model); // the very words of before
    }
    const bool same = taskvec::fingerprint(policy, live.model) == taskvec::fingerprint(policy, base.model());
    std::printf("the base is %s\n", same ? "back, bit for bit" : "lost");
}
// [end]

// Numbers in (-1, 1) that anyone can make again.
class numbers {
public:
    float operator()() { return static_cast<float>(state_ = state_ * 1664525u + 1013904223u) * 0x1p-31f - 1.0f; }

private:
    std::uint32_t state_ = 1;
};

constexpr std::int64_t out_features = 24, in_features = 32;

void save(const fs::path& directory, const std::vector<float>& weight)
{
    fs::create_directories(directory);
    taskvec::write_safetensors(directory / "model.safetensors",
        {{"layers.0.weight", {weight.data(), taskvec::dtype::f32, {out_features, in_features}}}});
}

void make_models(const fs::path& folder)
{
    numbers next;
    std::vector<float> base(out_features * in_features);
    for (float& x : base) { x = next(); }
    save(folder / "base", base);
    for (const char* const task : {"french", "code"}) {
        auto tuned = base;
        for (float& x : tuned) {
            const float much = next(), rarely = next();
            x += 0.1f * much * rarely;
        }
        save(folder / task, tuned);
    }
    taskvec::lora_update<float> update{.b = {out_features, 8, taskvec::matrix_order::row_major},
        .a = {8, in_features, taskvec::matrix_order::row_major},
        .scaling = 2};
    for (std::size_t k = 0; k < 8; ++k) { // of singular values that fall
        const float size = 1.0f / static_cast<float>(1 << k);
        for (std::size_t i = 0; i < out_features; ++i) { update.b(i, k) = size * next(); }
        for (std::size_t j = 0; j < in_features; ++j) { update.a(k, j) = next(); }
    }
    taskvec::peft_adapter<float> adapter;
    adapter.updates.emplace("layers.0", std::move(update));
    taskvec::write_peft(folder / "adapter", adapter);
}

} // namespace

int main(int argc, char** argv)
{
    const fs::path folder = argc > 1 ? argv[1] : "cookbook_models";
    make_models(folder);

    merge_checkpoints(folder);
    fuse_adapter(folder);
    const auto merged = taskvec::open_model(folder / "merged"), fused = taskvec::open_model(folder / "fused");
    std::printf("merged: fingerprint %016llx\n",
        static_cast<unsigned long long>(taskvec::fingerprint(taskvec::cpu{}, merged.model())));
    std::printf("fused: %zu tensor\n", fused.model().size());
    compress_adapter(folder);
    keep_what_matters(folder, "french");
    keep_what_matters(folder, "code");
    serve_tasks(folder);
}
