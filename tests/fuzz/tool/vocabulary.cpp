// Any two texts, with a zero byte between, are tokenizers whose models are lined up, or refused; of every policy the
// result has rows that the models have, and a tokenizer that is read again. scripts/fuzz compiles it together with
// tools/vocabulary.cpp. In the suite the tool itself goes through the corpus.
// SPDX-License-Identifier: Apache-2.0
#include "../../../tools/vocabulary.hpp"
#include "../../../tools/tokenizers.hpp"
#include "../fuzz.hpp"
#include "stand_ins.hpp"

#include <fstream>

namespace {

/// Two models' directories, and one for the result.
struct tokenizers : fuzz::directory {
    tokenizers()
        : directory("/dev/shm/taskvec-tokenizers-" + std::to_string(::getpid()))
    {
        for (const auto* name : {"a", "b", "c"}) { std::filesystem::create_directories(path() / name); }
    }
};

} // namespace

TASKVEC_FUZZ_TARGET(vocabulary)
{
    static const tokenizers folder;
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const auto end = std::min(text.find('\0'), size);
    const auto other = text.substr(std::min(end + 1, size));
    folder.put("a/tokenizer.json", text.substr(0, end));
    folder.put("b/tokenizer.json", other);
    // As many rows as the first bytes of the texts say.
    const std::vector<float> values(2 * 64, 1.0F);
    std::vector<taskvec::const_model_ref> models(2);
    for (std::size_t m = 0; m < 2; ++m) {
        const auto rows = static_cast<std::int64_t>(1 + (size * (m + 1) + size / 7) % 24);
        models[m].insert(
            "embed_tokens.weight", {values.data(), taskvec::dtype::f32, {rows, 2}, {}, taskvec::memory_space::host, 0});
    }
    tool::run_options quiet;
    quiet.quiet = true;
    for (const auto policy : {tool::vocabulary_policy::error, tool::vocabulary_policy::base,
             tool::vocabulary_policy::all, tool::vocabulary_policy::truncate}) {
        fuzz::read([&] {
            const tool::lined_up_vocabulary lined(
                {{folder.path() / "a", "'a'", &models[0]}, {folder.path() / "b", "'b'", &models[1]}}, policy, {},
                quiet);
            if (!lined.changed()) { return; }
            const auto& rows = lined.models()[0].find("embed_tokens.weight")->shape[0];
            fuzz::expect(rows == lined.models()[1].find("embed_tokens.weight")->shape[0], "rows that are not lined up");
            for (const auto& [name, content] : lined.tokenizer_files(quiet)) {
                if (name != "tokenizer.json" || !content) { continue; }
                folder.put("c/tokenizer.json", *content);
                const auto tokens = tool::read_tokens(folder.path() / "c/tokenizer.json");
                fuzz::expect(tokens.size() <= static_cast<std::uint64_t>(rows), "tokens without rows");
            }
        });
    }
}
