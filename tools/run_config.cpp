// taskvec run: a configuration of mergekit becomes the request that a command line of merge becomes.
// SPDX-License-Identifier: Apache-2.0
#include "run_config.hpp"

#include "model_files.hpp"
#include "vocabulary.hpp"

#include <memory>

namespace tool {

#if !defined(TASKVEC_HAS_YAML)

void run_config(run_settings&)
{
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
        "this build of taskvec reads no configurations: it was built without yaml-cpp (Debian: libyaml-cpp-dev); "
        "install it, configure anew and build again");
}

#endif

namespace {

const register_verb run_verb(25, "run", "Merge as a mergekit configuration says", [](command& verb) {
    const auto given = std::make_shared<run_settings>();
    verb.positional("CONFIG", given->config, "A configuration such as config.yml");
    verb.text("--out", given->request.out, "DIR", "Where the merged model goes, a directory", presence::required);
    verb.word("--semantics", given->semantics, {"mergekit", "paper"}, "WHOSE",
        "mergekit or paper: whose definition of a method to follow (default: what the configuration says under "
        "'taskvec', and mergekit)");
    verb.flag("--explain", given->explain, "Say what would be done for each tensor, and write nothing");
    verb.texts("--exclude", given->request.exclude, "REGEX",
        "Tensors that match are not merged: they are copied from the base, where it has them");
    verb.word("--missing", given->request.missing, {"error", "base"}, "WHAT",
        "error or base: a tensor that a model lacks and the base has (default: error, but for integers)");
    add_vocabulary_option(verb, given->request.vocabulary);
    given->request.match_prefixes = true; // mergekit knows the names of its architectures with and without them
    add_nonfinite_option(verb, given->request.nonfinite);
    add_overflow_option(verb, given->request.overflow);
    add_index_option(verb, given->request.index);
    add_shard_size_option(verb, given->request.shard_size);
    add_copy_options(verb, given->request.copies);
    add_resume_option(verb, given->request.resume, "Shards that are finished");
    add_run_options(verb, given->request.run);
    verb.foreign("mergekit-yaml",
        {{"--copy-tokenizer", "the files beside the weights are always copied, but for --no-copy"},
            {"--write-model-card", "a card is always written, but for --no-card"},
            {"--out-shard-size", "--shard-size 5GB counts bytes"}, {"--num-threads", "--threads"}, {"-j", "--threads"},
            {"--random-seed", "taskvec: {seed: 7} in the configuration"},
            {"--cuda", "--device cuda, in a build that has it"},
            {"--gpu-rich", "--device cuda, in a build that has it"},
            {"--read-to-gpu", "--device cuda, in a build that has it"},
            {"--multi-gpu", "leave it out, one device is used"}, {"--low-cpu-memory", "leave it out, it is always so"},
            {"--lazy-unpickle", "leave it out, it is always so"}, {"--async-write", "leave it out, it is always so"},
            {"--write-threads", "leave it out, --threads is for all"},
            {"--clone-tensors", "leave it out, what is one tensor under several names stays one"},
            {"--safe-serialization", "leave it out, safetensors are always written"},
            {"--allow-crimes", "leave it out, names and shapes of tensors say what fits"},
            {"--unsafe-truncate-embeddings", "--vocabulary truncate"},
            {"--trust-remote-code", "leave it out, no code of a model runs"},
            {"--transformers-cache", "HF_HUB_CACHE names the Hub's cache"},
            {"--lora-merge-cache", "leave it out, adapters are added as they are read"},
            {"--lora-merge-dtype", "leave it out, adapters are added in f32"}},
        "docs/migrate.md");
    verb.footer("Models are paths, or names that the Hub's cache on this machine holds; nothing is downloaded.\n"
                "\nExample:\n  taskvec run config.yml --out merged");
    verb.action([given] { run_config(*given); });
});

} // namespace

} // namespace tool
