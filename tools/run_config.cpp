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
        "error or base: a tensor that a model lacks and the base has (default: error)");
    add_vocabulary_option(verb, given->request.vocabulary);
    given->request.match_prefixes = true; // mergekit knows the names of its architectures with and without them
    add_nonfinite_option(verb, given->request.nonfinite);
    add_overflow_option(verb, given->request.overflow);
    add_index_option(verb, given->request.index);
    add_shard_size_option(verb, given->request.shard_size);
    add_copy_options(verb, given->request.copies);
    add_resume_option(verb, given->request.resume, "Shards that are finished");
    add_run_options(verb, given->request.run);
    verb.footer("Models are paths, or names that the Hub's cache on this machine holds; nothing is downloaded.\n"
                "\nExample:\n  taskvec run config.yml --out merged");
    verb.action([given] { run_config(*given); });
});

} // namespace

} // namespace tool
