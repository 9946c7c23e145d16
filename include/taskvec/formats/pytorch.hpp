// PyTorch files (pytorch_model.bin, .pt, .pth), read without Python: a zip archive with a pickle that builds tensors,
// and nothing else. No code runs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/dtype.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/file_kind.hpp>
#include <taskvec/formats/pickle.hpp>
#include <taskvec/formats/safetensors.hpp>
#include <taskvec/formats/system.hpp>
#include <taskvec/formats/zip_directory.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The most bytes, laid out, of a file's tensors that have more elements than their storage (expanded views).
inline constexpr std::uint64_t expanded_bytes_limit = std::uint64_t{1} << 30;

/// What a PyTorch file holds, in the terms of a safetensors header: tensors are ranges of the file's bytes (ranges may
/// be equal: tied weights).
struct pytorch_contents {
    safetensors_header header; ///< names, dtypes, shapes and places of the tensors
    std::vector<std::string> notes{}; ///< what whoever opens it should know
    /// Strides, in elements, of tensors that do not lie row-major in their bytes (transposed, parts of others, or
    /// expanded, whose elements share bytes): lay_out_rows() gives them rows. Every element lies in the file, from the
    /// entry's offset on; the entry's size is that of the rows.
    std::map<std::string, extents> strides{};
};

namespace detail {

/// Tensors of a PyTorch file by name, each checked against the archive.
class pytorch_tensors {
public:
    pytorch_tensors(std::string_view bytes, std::string_view file)
        : file_(file)
        , archive_(bytes, file)
    {
        const zip_directory::entry* code = nullptr;
        for (const auto& entry : archive_.entries()) {
            const auto slash = entry.name.find('/');
            if (slash == entry.name.npos || entry.name.substr(slash) != "/data.pkl") { continue; }
            if (code) { fail("holds two pickles"); }
            code = &entry;
            folder_ = std::string(entry.name.substr(0, slash + 1));
        }
        if (!code || archive_.find(folder_ + "constants.pkl")) {
            const auto kind = kind_of_zip(bytes);
            raise<format_error>(error_code::not_safetensors, kind.sentence(), std::string(file));
        }
        if (!code->stored || code->size > pickle_size_limit) {
            fail(code->stored ? "has a pickle of more than 100 MB" : "is compressed, which PyTorch never does");
        }
        if (const auto* const order = archive_.find(folder_ + "byteorder");
            order && archive_.content(*order) != "little") {
            fail("was written by a big-endian machine");
        }
        pickle_reader pickle(archive_.content(*code), file);
        const auto& result = pickle.run();
        read(pickle, result);
    }
    [[nodiscard]] pytorch_contents take() { return std::move(contents_); }

private:
    [[noreturn]] void fail(const std::string& what) const
    {
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file that ", what, ": ", convert_to_safetensors), std::string(file_));
    }
    [[noreturn]] void wrong(const std::string& name, const std::string& what) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("tensor '", name, "' ", what, ": the file is damaged; ", fetch_again), std::string(file_));
    }

    using value = pickle_reader::value;

    /// The same for tensors that lie in dictionaries of dictionaries, which safetensors has no names for.
    [[noreturn]] void fail_nested(const std::string& what, const value& key) const
    {
        const auto place =
            key.what == pickle_reader::kind::text ? "'" + first_words(key.text) + "'" : std::string("KEY");
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file that ", what,
                ": save the dictionary that is meant by itself, such as by "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True)[",
                place, "], 'model.safetensors')"),
            std::string(file_));
    }
    /// How many values of a dictionary are tensors.
    [[nodiscard]] std::size_t tensors_in(const pickle_reader& pickle, const value& dictionary)
    {
        const auto [place, is_new] = tensors_.try_emplace(&dictionary, 0); // one dictionary may stand in many places
        for (std::size_t i = 1; is_new && i < dictionary.items.size(); i += 2) {
            place->second += pickle.at(dictionary.items[i]).what == pickle_reader::kind::tensor ? 1u : 0u;
        }
        return place->second;
    }
    /// Whether a key of a training checkpoint names what training needs, and no model.
    [[nodiscard]] static bool belongs_to_training(std::string_view key)
    {
        for (const std::string_view word :
            {"optim", "sched", "scaler", "rng", "random", "callback", "hyper", "loops"}) {
            if (key.find(word) != key.npos) { return true; }
        }
        return false;
    }
    /// A dictionary within another, by name.
    struct part {
        std::string_view key;
        const value* content = nullptr;
    };
    /// Whether a dictionary holds tensors, itself or in those within it that belong to a model.
    [[nodiscard]] bool holds_tensors(const pickle_reader& pickle, const value& dictionary, unsigned depth = 0)
    {
        if (tensors_in(pickle, dictionary) > 0) { return true; }
        const auto [known, is_new] = holding_.try_emplace(&dictionary, false); // dictionaries may hold themselves
        if (is_new && depth < 8) {
            const bool holds = !parts_with_tensors(pickle, dictionary, depth + 1).empty();
            holding_[&dictionary] = holds;
            return holds;
        }
        return known->second;
    }
    /// The dictionaries within another that hold tensors.
    [[nodiscard]] std::vector<part> parts_with_tensors(
        const pickle_reader& pickle, const value& dictionary, unsigned depth = 0)
    {
        using kind = pickle_reader::kind;
        std::vector<part> found;
        for (std::size_t i = 0; i < dictionary.items.size(); i += 2) {
            const auto& key = pickle.at(dictionary.items[i]);
            const auto& inner = pickle.at(dictionary.items[i + 1]);
            if (key.what != kind::text || inner.what != kind::dictionary || belongs_to_training(key.text)) { continue; }
            if (holds_tensors(pickle, inner, depth)) { found.push_back({key.text, &inner}); }
        }
        return found;
    }
    /// The dictionary within a training checkpoint that has one of a model's usual names. Not one with fewer tensors
    /// than lie beside it.
    [[nodiscard]] part usual_part(const pickle_reader& pickle, const value& checkpoint)
    {
        using kind = pickle_reader::kind;
        const std::size_t own = tensors_in(pickle, checkpoint);
        for (const std::string_view usual : {"state_dict", "model_state_dict", "model", "module", "params_ema",
                 "params", "ema", "net", "network", "weights"}) {
            for (std::size_t i = 0; i < checkpoint.items.size(); i += 2) {
                const auto& key = pickle.at(checkpoint.items[i]);
                const auto& one = pickle.at(checkpoint.items[i + 1]);
                if (key.what != kind::text || key.text != usual) { continue; }
                if (const auto* const unknown = own == 0 ? opaque_in(pickle, one) : nullptr) {
                    pickle.refuse_opaque(unknown->text);
                }
                const bool holds = one.what == kind::dictionary && holds_tensors(pickle, one);
                if (holds && tensors_in(pickle, one) >= own) { return {usual, &one}; }
            }
        }
        return {};
    }
    /// The dictionary within a training checkpoint that alone holds tensors.
    [[nodiscard]] part only_part(const pickle_reader& pickle, const value& checkpoint)
    {
        const auto parts = parts_with_tensors(pickle, checkpoint);
        if (parts.size() > 1) {
            std::string names;
            for (const auto& one : parts) { names += (names.empty() ? "'" : ", '") + first_words(one.key) + "'"; }
            const value key{pickle_reader::kind::text, false, {}, 0, parts.front().key, {}};
            fail_nested("holds several dictionaries of tensors (" + names + ")", key);
        }
        return parts.empty() ? part{} : parts.front();
    }
    /// The model of a training checkpoint: under one of the usual names, or the only dictionary with tensors, down to
    /// the one that has them. What lies beside it is left out, with a note; tensors too, where they are fewer.
    [[nodiscard]] const value* state_dict_in(const pickle_reader& pickle, const value& result)
    {
        const auto* model = &result;
        std::string way, left;
        for (unsigned depth = 0; depth < 4; ++depth) {
            const std::size_t own = tensors_in(pickle, *model);
            auto inner = usual_part(pickle, *model);
            if (!inner.content && own == 0) { inner = only_part(pickle, *model); }
            if (!inner.content) { break; }
            if (own > 0) { left = message("; beside it ", own, own == 1 ? " tensor is" : " tensors are", " left out"); }
            way += (way.empty() ? "" : ".") + first_words(inner.key);
            model = inner.content;
        }
        if (way.empty()) { return model; }
        const auto& beside = pickle.first_opaque();
        contents_.notes.push_back(message("'", std::string(file_), "': its '", way, "' is taken", left,
            beside.empty() ? std::string() : "; what lies beside it names " + beside + ", and was not built"));
        return model;
    }

    void read(const pickle_reader& pickle, const pickle_reader::value& result)
    {
        using kind = pickle_reader::kind;
        if (result.what != kind::dictionary) { fail("holds no dictionary of tensors (a state_dict)"); }
        const auto* const model = state_dict_in(pickle, result);
        check_known(pickle, *model);
        std::size_t others = 0;
        std::string first_other;
        std::set<std::string_view> seen;
        for (std::size_t i = 0; i < model->items.size(); i += 2) {
            const auto& key = pickle.at(model->items[i]);
            const auto& tensor = pickle.at(model->items[i + 1]);
            if (key.what != kind::text || tensor.what != kind::tensor) {
                if (tensor.what == kind::dictionary && tensors_in(pickle, tensor) > 0) {
                    fail_nested("holds tensors and, under "
                            + (key.what == kind::text ? "'" + first_words(key.text) + "'" : std::string("a number"))
                            + ", more of them",
                        key);
                }
                ++others;
                if (first_other.empty()) { first_other = key.what == kind::text ? first_words(key.text) : "a number"; }
                continue;
            }
            if (!seen.insert(key.text).second) { // as in Python the last one would win: nothing that is saved has two
                fail(message("names tensor '", first_words(key.text), "' twice"));
            }
            add(std::string(key.text), pickle, tensor);
        }
        if (contents_.header.entries.empty() && others > 0) { fail("holds no tensors by name"); }
        if (others > 0) {
            contents_.notes.push_back(message("'", std::string(file_), "': ", others,
                others == 1 ? " value that is no tensor ('" : " values that are no tensors ('", first_other,
                others == 1 ? "') is left out" : "' …) are left out"));
        }
        auto& entries = contents_.header.entries;
        std::stable_sort(
            entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
        contents_.header.metadata.emplace("format", "pt");
    }

    /// The value itself where it is opaque, or the first key or value of a dictionary that is.
    [[nodiscard]] static const pickle_reader::value* opaque_in(
        const pickle_reader& pickle, const pickle_reader::value& one)
    {
        using kind = pickle_reader::kind;
        if (one.what == kind::opaque) { return &one; }
        if (one.what != kind::dictionary) { return nullptr; }
        for (const auto item : one.items) {
            if (pickle.at(item).what == kind::opaque) { return &pickle.at(item); }
        }
        return nullptr;
    }
    /// Refuses a model with values, or dictionaries of values, that nothing is known of, and one that was given to
    /// such.
    static void check_known(const pickle_reader& pickle, const pickle_reader::value& model)
    {
        using kind = pickle_reader::kind;
        if (const auto* const one = opaque_in(pickle, model)) { pickle.refuse_opaque(one->text); }
        bool given = pickle.was_given(model);
        for (const auto item : model.items) {
            const auto& value = pickle.at(item);
            if (const auto* const one = opaque_in(pickle, value)) { pickle.refuse_opaque(one->text); }
            given = given || (value.what == kind::tensor && pickle.was_given(value));
        }
        if (given) {
            const auto& first = pickle.first_opaque();
            pickle.refuse("gives the model's tensors to " + (first.empty() ? std::string("a set") : first));
        }
    }
    void add(std::string name, const pickle_reader& pickle, const pickle_reader::value& tensor)
    {
        if (name.empty() || !is_text(name)) { fail("has a tensor whose name is empty or no UTF-8"); }
        if (tensor.items.size() > 3) { check_metadata(name, pickle, pickle.at(tensor.items[3])); }
        const auto& storage = pickle.at(tensor.items[0]);
        const auto* const entry = archive_.find(folder_ + "data/" + std::string(storage.text));
        if (!entry) { wrong(name, message("lies in 'data/", first_words(storage.text), "', which is not there")); }
        if (!entry->stored) { fail(message("has tensor '", name, "' compressed, which PyTorch never does")); }
        const std::uint64_t width = bits_per_element(tensor.type) / 8;
        const std::uint64_t storage_width = bits_per_element(storage.type) / 8;
        if (static_cast<std::uint64_t>(storage.number) > entry->size / storage_width
            || static_cast<std::uint64_t>(storage.number) * storage_width != entry->size) {
            wrong(name,
                message(
                    "lies in a storage of ", storage.number, " × ", storage_width, " bytes, which has ", entry->size));
        }
        extents shape, strides;
        std::uint64_t count = 1;
        bool empty = false;
        for (const auto item : pickle.at(tensor.items[1]).items) {
            shape.push_back(pickle.at(item).number);
            empty = empty || shape.back() == 0;
        }
        for (const auto item : pickle.at(tensor.items[2]).items) { strides.push_back(pickle.at(item).number); }
        for (const auto extent : shape) {
            if (!empty && detail::product_wraps(count, static_cast<std::uint64_t>(extent), count)) {
                wrong(name, "has a shape whose product is above 2^64-1");
            }
        }
        if (empty) { count = 0; }
        const auto first = static_cast<std::uint64_t>(tensor.number), room = entry->size / width;
        const bool spread = first <= room && count > room - first; // more elements than bytes: expanded, or overlapping
        if (first > room) {
            wrong(name,
                message("of ", to_string(tensor.type), " ", to_string(shape), " runs past the end of its storage"));
        }
        if (const const_tensor_ref view{nullptr, tensor.type, shape, strides};
            !empty && (spread || !view.contiguous())) {
            std::uint64_t last = first, way = 0;
            for (std::size_t d = 0; d < shape.size(); ++d) {
                if (detail::product_wraps(
                        static_cast<std::uint64_t>(shape[d]) - 1, static_cast<std::uint64_t>(strides[d]), way)
                    || detail::sum_wraps(last, way, last) || last >= room) {
                    wrong(name,
                        message("of ", to_string(tensor.type), " ", to_string(shape), " with strides ",
                            to_string(strides), " runs past the end of its storage"));
                }
            }
            if (spread) { // a file of a few bytes must not fill the disk
                if (last >= room || count > (expanded_bytes_limit - expanded_) / width) {
                    fail(message("has tensor '", name, "' of ", to_string(tensor.type), " ", to_string(shape),
                        " expanded from ", room - first, " elements, and more than ", expanded_bytes_limit,
                        " bytes of such tensors"));
                }
                expanded_ += count * width;
            }
            contents_.strides.emplace(name, std::move(strides));
        }
        contents_.header.entries.push_back(
            {std::move(name), tensor.type, std::move(shape), entry->offset + first * width, count * width});
    }
    /// Refuses a tensor whose numbers are others than its bytes: lazily conjugated or negated views have a bit for it.
    void check_metadata(
        const std::string& name, const pickle_reader& pickle, const pickle_reader::value& metadata) const
    {
        using kind = pickle_reader::kind;
        if (metadata.what == kind::none || (metadata.what == kind::number && metadata.number == 0)) { return; }
        if (metadata.what != kind::dictionary) {
            fail(message("says more of tensor '", name, "' than its type, shape and bytes"));
        }
        for (std::size_t i = 0; i < metadata.items.size(); i += 2) {
            const auto& key = pickle.at(metadata.items[i]);
            const auto& said = pickle.at(metadata.items[i + 1]);
            const auto word = key.what == kind::text ? key.text : std::string_view();
            if ((word == "neg" || word == "conj") && said.what == kind::number && said.number == 0) { continue; }
            if (word == "neg" || word == "conj") {
                raise<format_error>(error_code::pickle_unsupported,
                    message("is a PyTorch file whose tensor '", name, "' is a view that is ",
                        word == "neg" ? "negated" : "conjugated", " as it is read (its metadata has '", word,
                        "'), which its bytes do not show: save it with .resolve_conj().resolve_neg()"),
                    std::string(file_));
            }
            fail(message("says '", first_words(word), "' of tensor '", name,
                "', which is neither its type, its shape nor its bytes"));
        }
    }
    /// Whether a name can be a safetensors name: UTF-8.
    [[nodiscard]] static bool is_text(std::string_view text)
    {
        for (std::size_t i = 0; i < text.size();) {
            const auto first = static_cast<unsigned char>(text[i]);
            const std::size_t more = first < 0x80 ? 0
                : first < 0xc2                    ? 4
                : first < 0xe0                    ? 1
                : first < 0xf0                    ? 2
                : first < 0xf5                    ? 3
                                                  : 4;
            if (more == 4 || text.size() - i <= more) { return false; }
            for (std::size_t k = 1; k <= more; ++k) {
                if ((static_cast<unsigned char>(text[i + k]) & 0xc0u) != 0x80u) { return false; }
            }
            const auto second = more > 0 ? static_cast<unsigned char>(text[i + 1]) : 0u;
            if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90)
                || (first == 0xf4 && second > 0x8f)) {
                return false;
            }
            i += more + 1;
        }
        return true;
    }

    std::string_view file_;
    zip_directory archive_;
    std::string folder_;
    std::uint64_t expanded_ = 0; ///< bytes of tensors that have more elements than their storage
    std::map<const value*, std::size_t> tensors_; // in dictionaries
    std::map<const value*, bool> holding_; // of dictionaries: see holds_tensors()
    pytorch_contents contents_;
};

} // namespace detail

/// Reads what a PyTorch file (torch.save() since 1.6) holds: a dictionary from names to tensors, or a training
/// checkpoint with one under `state_dict`, `model` or the like. The pickle is interpreted by a machine that knows
/// numbers, texts, collections and the functions that rebuild tensors and parameters; nothing runs. Anything else that
/// it names is refused by that name where the model holds it or was given to it, and otherwise (the arguments of a
/// training, beside its state_dict) not built, with a note; what else it does is refused. Checked: every record of the
/// archive (64-bit ones too), that entries share no bytes and are neither compressed nor encrypted, storages against
/// their sizes, tensors against their storages. Values that are no tensors are noted. Throws format_error naming `file`
/// and the tensor. Cost: O(pickle); no tensor byte is read.
[[nodiscard]] inline pytorch_contents parse_pytorch(std::span<const std::byte> bytes, std::string_view file)
{
    return detail::pytorch_tensors({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, file).take();
}

namespace detail {

/// Copies a tensor of elements of `Word` to row-major memory, in tiles of its last two dimensions: the columns of a
/// transposed matrix share lines of the cache.
template <class Word>
void copy_rows(const std::byte* from, const extents& shape, const extents& strides, std::byte* to)
{
    constexpr std::int64_t tile = 32;
    const std::size_t rank = shape.size();
    const std::int64_t columns = shape[rank - 1], rows = rank > 1 ? shape[rank - 2] : 1;
    const std::int64_t by_column = strides[rank - 1], by_row = rank > 1 ? strides[rank - 2] : 0;
    std::int64_t outer = 1;
    for (std::size_t d = 0; d + 2 < rank; ++d) { outer *= shape[d]; }
    for (std::int64_t block = 0; block < outer; ++block) {
        std::int64_t begin = 0, rest = block;
        for (std::size_t d = rank; d-- > 2;) {
            begin += rest % shape[d - 2] * strides[d - 2];
            rest /= shape[d - 2];
        }
        std::byte* const out = to + static_cast<std::size_t>(block * rows * columns) * sizeof(Word);
        for (std::int64_t i0 = 0; i0 < rows; i0 += tile) {
            for (std::int64_t j0 = 0; j0 < columns; j0 += tile) {
                for (std::int64_t i = i0; i < std::min(rows, i0 + tile); ++i) {
                    for (std::int64_t j = j0; j < std::min(columns, j0 + tile); ++j) {
                        Word word;
                        std::memcpy(&word,
                            from + static_cast<std::size_t>(begin + i * by_row + j * by_column) * sizeof(Word),
                            sizeof word);
                        std::memcpy(out + static_cast<std::size_t>(i * columns + j) * sizeof(Word), &word, sizeof word);
                    }
                }
            }
        }
    }
}

} // namespace detail

/// Lays the tensors of contents.strides out row-major, one after another, in a file without a name in `folder`, and
/// gives their entries offsets behind the end of `bytes`, as safetensors_file takes them; a note says so. Null where
/// all lie so already. Memory: none but the page cache's. Throws io_error. Cost: one read of these tensors.
[[nodiscard]] inline std::shared_ptr<const std::byte> lay_out_rows(pytorch_contents& contents,
    std::span<const std::byte> bytes, std::string_view file, const std::filesystem::path& folder)
{
    if (contents.strides.empty()) { return nullptr; }
    std::uint64_t total = 0;
    const auto padded = [](std::uint64_t size) { return (size + 63) / 64 * 64; };
    for (const auto& entry : contents.header.entries) {
        if (contents.strides.contains(entry.name)) { total += padded(entry.bytes); }
    }
    auto* const memory =
        static_cast<std::byte*>(detail::map_unnamed_file(folder, total, "tensors that are stored transposed"));
    const auto size = static_cast<std::size_t>(total);
    std::shared_ptr<const std::byte> result(
        memory, [size](const std::byte* data) { detail::system::unmap(data, size); });
    std::uint64_t at = 0;
    for (auto& entry : contents.header.entries) {
        const auto place = contents.strides.find(entry.name);
        if (place == contents.strides.end()) { continue; }
        const auto* const from = bytes.data() + entry.offset;
        switch (bits_per_element(entry.dtype)) {
        case 8: detail::copy_rows<std::uint8_t>(from, entry.shape, place->second, memory + at); break;
        case 16: detail::copy_rows<std::uint16_t>(from, entry.shape, place->second, memory + at); break;
        case 32: detail::copy_rows<std::uint32_t>(from, entry.shape, place->second, memory + at); break;
        default: detail::copy_rows<std::uint64_t>(from, entry.shape, place->second, memory + at);
        }
        entry.offset = bytes.size() + at;
        at += padded(entry.bytes);
    }
    const auto count = contents.strides.size();
    contents.notes.push_back(message("'", std::string(file), "': ", count, count == 1 ? " tensor ('" : " tensors ('",
        contents.strides.begin()->first, count == 1 ? "') does" : "' …) do",
        " not lie row by row there (transposed or expanded, say): laid out in a temporary file of ", total, " bytes"));
    contents.strides.clear();
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
