// Trains, merges and measures real models on handwritten digits, and prints the papers' tables.
// SPDX-License-Identifier: Apache-2.0
//
//     digits --out DIR                          everything, for one seed
//     digits --out DIR --part fft --seeds 8     one part, mean ± standard deviation over eight seeds
//     digits --out DIR --score merged.safetensors    the accuracy of a model, or of a LoRA adapter, made from the
//     checkpoints in DIR
#include "checkpoints.hpp"
#include "fft.hpp"
#include "fusion.hpp"
#include "lora.hpp"
#include "low_rank.hpp"
#include "reuse.hpp"
#include "setting.hpp"
#include "way.hpp"

#include <taskvec/core/error.hpp>

#include <CLI/CLI.hpp>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace digits;

struct options {
    std::filesystem::path out, data = DIGITS_DATA_FILE, score;
    std::uint64_t seed = 1;
    int seeds = 1;
    std::set<std::string> parts;
    bool complete = false;
    std::string split = "validation";
};

void print(const std::string& text)
{
    std::fputs((text + "\n").c_str(), stdout);
    std::fflush(stdout);
}

/// The model of a safetensors file; of a PEFT adapter directory the base of --out with the adapter folded in.
encoder model_of(const options& o)
{
    return std::filesystem::is_directory(o.score)
        ? folded(load_encoder(o.out / "base.safetensors"), load_updates(o.score))
        : load_encoder(o.score);
}

/// The accuracy of one model on every task, the average last.
void score(const options& o)
{
    const auto parts = split(load_images(o.data), o.seed);
    const auto accuracies = evaluate(model_of(o), load_head(o.out / "head.safetensors"),
        in_every_domain(o.split == "test" ? parts.test : parts.validation));
    std::string line;
    for (std::size_t task = 0; task < tasks; ++task) {
        line += taskvec::message(task_names[task], ' ', percent(accuracies[task]), ' ');
    }
    print(line + "Avg " + percent(mean(accuracies)));
}

class stopwatch {
public:
    double seconds()
    {
        const auto now = std::chrono::steady_clock::now();
        return std::chrono::duration<double>(now - std::exchange(last_, now)).count();
    }

private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

void experiment(const options& o)
{
    const auto wanted = [&](const char* part) { return o.parts.empty() || o.parts.contains(part); };
    const dataset images = load_images(o.data);
    std::filesystem::create_directories(o.out);

    fft_results fft;
    lora_results lora;
    fusion_results fusion;
    for (int i = 0; i < o.seeds; ++i) {
        const setting s = make_setting(images, o.seed + static_cast<std::uint64_t>(i));
        // The files are those of the first seed.
        const auto out = i == 0 ? std::optional(o.out) : std::nullopt;
        stopwatch watch;
        const auto report = [&](const char* part) {
            std::fprintf(
                stderr, "seed %llu: %s took %.1f s\n", static_cast<unsigned long long>(s.seed), part, watch.seconds());
        };
        if (wanted("fft")) {
            run_fft(s, out, fft);
            report("full fine-tuning, its merges and scores");
        }
        const adapter initial = initial_adapter(s.seed);
        std::vector<adapter> adapters;
        if (wanted("lora") || wanted("fusion")) {
            adapters = fine_tune_adapters(s, initial, parameterisation::lora);
            report("fine-tuning LoRA adapters");
        }
        if (wanted("lora")) {
            run_lora(s, adapters, out, lora);
            report("merging and truncating LoRA adapters");
        }
        if (wanted("fusion")) {
            const std::vector<adapter> linearized = fine_tune_adapters(s, initial, parameterisation::linearized);
            if (out) { save_linearized(s.base, initial, linearized, *out); }
            const std::vector<way> ways{full_way(s, fine_tune_all(s)),
                adapter_way(s, initial, adapters, parameterisation::lora),
                adapter_way(s, initial, linearized, parameterisation::linearized),
                linearized_way(s, fine_tune_linearized(s))};
            report("fine-tuning in the linearized ways");
            run_fusion(s, ways, o.complete ? effort::complete() : effort{}, fusion);
            report("merging subsets of tasks in four ways, and disentanglement");
        }
    }

    if (wanted("fft")) {
        print(fft.methods.text());
        print("Chosen on validation\n" + fft.chosen);
        write_fft(fft, o.out);
    }
    if (wanted("lora")) {
        print(lora.methods.text());
        print("Chosen on validation\n" + lora.chosen);
        print(lora.kept.text());
        print(text(lora));
        write_lora(lora, o.out);
    }
    if (wanted("fft") && wanted("lora")) { print(equal_storage(fft, lora)); }
    if (wanted("fusion")) {
        for (const auto& one : fusion.ways) { print(one.methods.text()); }
        print(text(fusion));
        write_fusion(fusion, o.out);
    }
    print(taskvec::message("What this small setting says about the papers' claims, as measured above\n", papers, " ",
        o.seeds > 1 ? "\"Within noise\": the difference is within its deviation over the seeds.\n"
                    : "Of one seed: a small difference may be noise, and --seeds 8 says whether it is.\n"));
    if (wanted("fft")) { print(text(fft_claims(fft))); }
    if (wanted("lora")) { print(text(lora_claims(lora))); }
    if (wanted("fft") && wanted("lora")) { print(text(reuse_claims(fft, lora))); }
    if (wanted("fusion")) { print(text(fusion_claims(fusion))); }
}

} // namespace

int main(int argc, char** argv)
{
    options o;
    CLI::App app{"Trains, merges and measures real models on 1,797 handwritten digits in eight domains: the tables of "
                 "two papers on reusing fine-tuned models.\n"
                 "Example: digits --out build/digits"};
    app.add_option("--out", o.out, "Folder for checkpoints, tables (CSV) and figures (SVG); created if need be")
        ->required();
    app.add_option("--seed", o.seed, "Seed of the split, of every initialisation and of every batch")
        ->capture_default_str();
    app.add_option(
           "--seeds", o.seeds, "Number of seeds, from --seed upwards: the tables then give mean ± standard deviation")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    app.add_option("--data", o.data, "The digits, a CSV file")->capture_default_str();
    app.add_option("--part", o.parts, "Only this part; repeat for several")
        ->check(CLI::IsMember({"fft", "lora", "fusion"}));
    app.add_flag("--complete", o.complete,
        "fusion: all 247 subsets of tasks, λ on all validation images, ξ of all pairs of tasks on a finer grid; takes "
        "many times as long");
    app.add_option("--score", o.score,
        "Train nothing: print the accuracy of this safetensors file's model, or of this PEFT adapter directory, made "
        "from the checkpoints in --out (same --seed)");
    app.add_option("--split", o.split, "What --score measures on")
        ->check(CLI::IsMember({"validation", "test"}))
        ->capture_default_str();
    try {
        app.parse(argc, argv);
    }
    catch (const CLI::ParseError& e) {
        const int code = app.exit(e);
        return code == 0 ? 0 : 2;
    }
    try {
        o.score.empty() ? experiment(o) : score(o);
    }
    catch (const std::exception& e) {
        std::fprintf(stderr, "digits: error: %s\n", e.what());
        return 1;
    }
    return 0;
}
