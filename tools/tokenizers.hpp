// Tokenizers' files beside models, and what tokenizer.json says of tokens.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

inline constexpr const char* tokenizer_name = "tokenizer.json";
/// What transformers' tokenizers without tokenizer.json read.
inline constexpr std::array slow_tokenizer_names{"vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "tokenizer.tiktoken"};

/// The tokenizer.json beside a model's weights: in its directory, or beside a file that is a directory's whole model.
/// Empty where there is none.
[[nodiscard]] fs::path tokenizer_of(const fs::path& model);
/// The files of a tokenizer that are in a model's or an adapter's directory.
[[nodiscard]] std::vector<fs::path> tokenizer_files_in(const fs::path& directory);

/// A token that tokenizers add to their model's vocabulary, as tokenizer.json describes it.
struct added_token {
    std::string content;
    std::uint32_t id = 0;
    bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};
/// What tokenizer.json says of ids.
struct token_table {
    std::map<std::string, std::uint32_t, std::less<>> ids; ///< of the model's vocabulary and of added tokens
    std::map<std::uint32_t, const std::string*> texts;
    std::map<std::string, added_token, std::less<>> added;
    std::string model; ///< "BPE", "WordPiece", "Unigram", …
    /// One above the highest id.
    [[nodiscard]] std::uint64_t size() const { return texts.empty() ? 0 : std::uint64_t{texts.rbegin()->first} + 1; }
    [[nodiscard]] const std::string* text(std::uint64_t id) const;
};
/// Reads `vocab` of the model and `added_tokens`; the rest of the file is only looked over. Throws format_error for
/// what is no tokenizer, or gives one id or one token twice.
[[nodiscard]] token_table read_tokens(const fs::path& tokenizer);
/// Calls `f` with the two tokens of each merge of a tokenizer.json, in order.
void each_merge(const fs::path& tokenizer, const std::function<void(const std::string&, const std::string&)>& f);
/// Whether a glance at a tokenizer shows that its tokens have `rows` rows: no number after a colon, as ids are, reaches
/// them, and no more texts are followed by a number, as pieces are. One pass over the bytes, a tenth of what reading
/// takes; false says nothing.
[[nodiscard]] bool glance_finds_rows(const fs::path& tokenizer, std::uint64_t rows);
/// Whether two files hold the same bytes.
[[nodiscard]] bool equal_files(const fs::path& a, const fs::path& b);
/// Throws format_error for a tokenizer.json.
[[noreturn, gnu::cold]] void refuse_tokenizer(const fs::path& tokenizer, const std::string& what);

} // namespace tool
