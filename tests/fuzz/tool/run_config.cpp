// Any text is a configuration that becomes a request, or refused. scripts/fuzz compiles it together with
// tools/config_*.cpp; what does the work stands here as functions that do nothing. In the suite the tool itself goes
// through the corpus.
// SPDX-License-Identifier: Apache-2.0
#include "../../../tools/run_config.hpp"
#include "../../../tools/mergekit_words.hpp"
#include "../../../tools/scoring.hpp"
#include "../fuzz.hpp"
#include "stand_ins.hpp"

#include <taskvec/formats/safetensors.hpp>

namespace tool {

/// Every method, with a few rows.
const std::vector<method_entry>& all_methods()
{
    static const std::vector<method_entry> entries = [] {
        std::vector<method_entry> result;
        for (const auto& method : mergekit_methods()) {
            method_entry entry;
            entry.name = method.ours;
            for (const auto* row : {"lambda", "density", "seed"}) { entry.options.emplace_back().name = row; }
            result.push_back(std::move(entry));
        }
        return result;
    }();
    return entries;
}
const method_entry* method_named(std::string_view name)
{
    for (const auto& entry : all_methods()) {
        if (entry.name == name) { return &entry; }
    }
    return nullptr;
}
const method_entry& find_method(const merge_request& request)
{
    const auto* const found = method_named(request.method);
    fuzz::expect(found, "a request for a method that is not there");
    return *found;
}
void run_merge(const merge_request& request)
{
    (void)find_method(request);
    fuzz::expect(!request.tasks.empty() && !request.out.empty(), "a request without tasks or output");
}
void explain_merge(const merge_request& request, const std::string&)
{
    run_merge(request);
}
taskvec::checkpoint open_guarded(const fs::path& path)
{
    return taskvec::open_model(path);
}
taskvec::checkpoint open_guarded(const fs::path& path, taskvec::index_check how)
{
    return taskvec::open_model(path, how);
}
void append_layers(model_view&, const std::string&, std::size_t, std::size_t) { }
bool part_of_model::holds(std::string_view) const
{
    return true;
}
void outline_merge(const merge_request&, const fs::path&, unsigned char) { }
std::string why_stored(const merge_request&)
{
    return "";
}
std::shared_ptr<const taskvec::const_model_ref> merge_unstored(
    const merge_request& request, const fs::path&, unsigned char)
{
    run_merge(request);
    return std::make_shared<const taskvec::const_model_ref>();
}

scratch_directory::scratch_directory(const fs::path& parent)
    : path_(parent / "scratch")
{ }
scratch_directory::~scratch_directory() = default;

} // namespace tool

namespace {

/// A directory with the models `base`, `a` and `b`, of two layers, as the working directory.
struct models_of_configurations {
    std::filesystem::path path;
    models_of_configurations()
        : path(std::filesystem::temp_directory_path() / ("taskvec-configurations-" + std::to_string(::getpid())))
    {
        const std::vector<float> values(6, 1.0F);
        taskvec::const_model_ref model;
        for (const auto* name : {"embed.weight", "layers.0.weight", "layers.1.weight"}) {
            model.insert(name, {values.data(), taskvec::dtype::f32, {2, 3}, {}, taskvec::memory_space::host, 0});
        }
        for (const auto* name : {"base", "a", "b"}) {
            std::filesystem::create_directories(path / name);
            taskvec::write_safetensors(path / name / "model.safetensors", model, {}, taskvec::durability::process);
        }
        std::filesystem::current_path(path);
        ::setenv("HF_HUB_CACHE", path.c_str(), 1);
    }
    ~models_of_configurations()
    {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
};

} // namespace

TASKVEC_FUZZ_TARGET(run_config)
{
    static const models_of_configurations models;
    const fuzz::memory_file file(std::string_view(reinterpret_cast<const char*>(data), size));
    fuzz::read([&] {
        tool::run_settings given;
        given.config = file.path();
        given.request.out = "out";
        try {
            tool::run_config(given);
        }
        catch (const tool::usage_error& refused) {
            fuzz::expect(*refused.what() != 0, "wrong usage without words");
        }
    });
}
