// The safetensors format: a strict reader over a memory map, and an atomic writer that takes bytes in any order.
// SPDX-License-Identifier: Apache-2.0
//
// Format: https://github.com/huggingface/safetensors. A file is an 8-byte little-endian header length, that many bytes
// of JSON, and one buffer that the tensors tile.
#pragma once

#include <taskvec/core/sink.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/file_kind.hpp>
#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A file's `__metadata__`: strings by name.
using metadata_map = std::map<std::string, std::string>;

/// The longest header that a reader accepts and a writer makes.
inline constexpr std::uint64_t safetensors_header_limit = 100'000'000;

/// One tensor of a file.
struct safetensors_entry {
    std::string name; ///< of the tensor
    taskvec::dtype dtype = taskvec::dtype::f32; ///< as it is stored
    extents shape{}; ///< slowest first
    std::uint64_t offset = 0; ///< of its first byte, from the beginning of the file
    std::uint64_t bytes = 0; ///< of the tensor
};

/// What a header says, checked.
struct safetensors_header {
    std::vector<safetensors_entry> entries; ///< in the order of their bytes in the file
    metadata_map metadata; ///< of __metadata__
    std::uint64_t data_offset = 0; ///< where the buffer begins, from the beginning of the file
};

namespace detail {

/// Reads a header's JSON event by event, so that its cost in memory is that of its result.
class safetensors_events final : public nlohmann::json_sax<nlohmann::json> {
public:
    struct tensor {
        std::string name;
        taskvec::dtype dtype = taskvec::dtype::f32;
        std::vector<std::uint64_t> shape, range;
        bool has_dtype = false, has_shape = false, has_range = false;
    };

    explicit safetensors_events(std::string_view file)
        : file_(file)
    { }

    std::vector<tensor> tensors;
    metadata_map metadata;

    [[noreturn]] bool fail(const std::string& what, std::uint64_t position)
    {
        raise<format_error>(error_code::json_syntax,
            message("header is not valid JSON at byte ", 8 + position, ": ", what), file_, 8 + position);
    }

    bool null() override
    {
        // The reference reader takes a null __metadata__ for none at all.
        return top() == state::root && in_metadata_key() ? true : scalar("null");
    }
    bool boolean(bool) override { return scalar("a boolean"); }
    bool number_integer(number_integer_t x) override { return scalar(x == 0 ? "-0" : "a negative number"); }
    bool number_float(number_float_t, const string_t& text) override { return scalar(text); }
    bool number_unsigned(number_unsigned_t x) override
    {
        if (top() == state::shape) { tensors.back().shape.push_back(x); }
        else if (top() == state::range) {
            if (tensors.back().range.size() == 2) { bad("data_offsets has more than two numbers"); }
            tensors.back().range.push_back(x);
        }
        else {
            return scalar("a number");
        }
        return true;
    }
    bool string(string_t& x) override
    {
        if (top() == state::metadata) { metadata[key_] = std::move(x); }
        else if (top() == state::tensor && key_ == "dtype") {
            const auto type = parse_dtype(x);
            if (!type) { bad(message("has the unknown dtype '", x, "'")); }
            tensors.back().dtype = *type;
            tensors.back().has_dtype = true;
        }
        else {
            return scalar("a string");
        }
        return true;
    }
    bool binary(binary_t&) override { return scalar("binary"); }

    bool start_object(std::size_t) override
    {
        if (stack_.empty()) { return push(state::root); }
        if (top() == state::root) {
            if (in_metadata_key()) { return push(state::metadata); }
            tensors.push_back({.name = key_, .shape = {}, .range = {}});
            return push(state::tensor);
        }
        if (!ignoring()) { scalar("an object"); }
        return push(state::ignored);
    }
    bool start_array(std::size_t) override
    {
        if (!stack_.empty() && top() == state::tensor && key_ == "shape") {
            tensors.back().has_shape = true;
            return push(state::shape);
        }
        if (!stack_.empty() && top() == state::tensor && key_ == "data_offsets") {
            tensors.back().has_range = true;
            return push(state::range);
        }
        if (stack_.empty() || !ignoring()) { scalar("an array"); }
        return push(state::ignored);
    }
    bool key(string_t& x) override
    {
        if (!stack_.back().keys.insert(x).second) {
            const auto kind = top();
            if (kind == state::root) {
                raise<format_error>(error_code::json_key_repeated,
                    message("tensor '", x, "' occurs twice in the header"), file_, std::uint64_t{8});
            }
            if (kind == state::metadata) {
                raise<format_error>(error_code::json_key_repeated, message("metadata key '", x, "' occurs twice"),
                    file_, std::uint64_t{8});
            }
            bad(message("has the key '", x, "' twice"));
        }
        key_ = std::move(x);
        return true;
    }
    bool end_object() override
    {
        if (top() == state::tensor) {
            const auto& t = tensors.back();
            if (!t.has_dtype || !t.has_shape || !t.has_range) {
                bad(message("has no ", !t.has_dtype ? "dtype" : !t.has_shape ? "shape" : "data_offsets"));
            }
        }
        return pop();
    }
    bool end_array() override
    {
        if (top() == state::range && tensors.back().range.size() != 2) {
            bad("has data_offsets of fewer than two numbers");
        }
        return pop();
    }
    bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& ex) override
    {
        fail(syntax_message(ex.what()), position ? position - 1 : 0);
    }

private:
    enum class state : std::uint8_t { none, root, metadata, tensor, shape, range, ignored };
    struct frame {
        state kind = state::none;
        std::set<std::string> keys{};
    };

    [[nodiscard]] state top() const { return stack_.empty() ? state::none : stack_.back().kind; }
    [[nodiscard]] bool in_metadata_key() const { return key_ == "__metadata__"; }
    /// Keys of a tensor that the format does not know are ignored, as the reference reader does.
    [[nodiscard]] bool ignoring() const
    {
        return top() == state::ignored
            || (top() == state::tensor && key_ != "dtype" && key_ != "shape" && key_ != "data_offsets");
    }
    /// A value that is neither a string nor an unsigned number where one belongs.
    bool scalar(std::string_view found)
    {
        if (ignoring()) { return true; }
        switch (top()) {
        case state::none:
            raise<format_error>(error_code::header_field, message("header is ", found, "; expected a JSON object"),
                file_, std::uint64_t{8});
        case state::root:
            raise<format_error>(error_code::header_field,
                message(in_metadata_key() ? "__metadata__" : "tensor '" + key_ + "'", " is ", found,
                    "; expected a JSON object"),
                file_, std::uint64_t{8});
        case state::metadata:
            raise<format_error>(error_code::header_field,
                message("metadata '", key_, "' is ", found, "; expected a string"), file_, std::uint64_t{8});
        case state::shape: bad(message("has ", found, " in its shape; expected unsigned integers"));
        case state::range: bad(message("has ", found, " in its data_offsets; expected unsigned integers"));
        default:
            bad(message("has ", found, " as its ", key_,
                key_ == "dtype" ? "; expected a string" : "; expected an array of unsigned integers"));
        }
    }
    [[noreturn]] void bad(const std::string& what)
    {
        raise<format_error>(
            error_code::header_field, message("tensor '", tensors.back().name, "' ", what), file_, std::uint64_t{8});
    }
    bool push(state kind)
    {
        if (stack_.size() == json_depth_limit) {
            raise<format_error>(error_code::json_syntax,
                message("header is nested deeper than ", json_depth_limit, " levels"), file_, std::uint64_t{8});
        }
        stack_.push_back({kind});
        return true;
    }
    bool pop()
    {
        stack_.pop_back();
        return true;
    }

    std::string file_;
    std::vector<frame> stack_;
    std::string key_;
};

/// Checks one tensor's numbers the way the reference reader does; `start` is where its bytes must begin in the buffer.
inline safetensors_entry check_tensor(
    safetensors_events::tensor&& t, std::uint64_t start, std::uint64_t data_offset, std::string_view file)
{
    const auto fail = [&](const std::string& what) {
        raise<format_error>(
            error_code::tensor_offsets, message("tensor '", t.name, "' ", what), std::string(file), data_offset);
    };
    const std::uint64_t begin = t.range[0], end = t.range[1];
    if (begin > end) { fail(message("has data_offsets [", begin, ", ", end, "] that run backwards")); }
    if (begin != start) {
        fail(message("begins at byte ", begin, " of the buffer; expected ", start,
            ", where the tensor before it ends: the buffer has ", begin > start ? "a hole" : "an overlap"));
    }
    std::uint64_t count = 1;
    extents shape;
    shape.reserve(t.shape.size());
    for (const auto extent : t.shape) {
        if (product_wraps(count, extent, count)) { fail("has a shape whose product is above 2^64-1"); }
        if (extent > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
            fail("has an extent above 2^63-1");
        }
        shape.push_back(static_cast<std::int64_t>(extent));
    }
    std::uint64_t bit_count = 0;
    if (product_wraps(count, bits_per_element(t.dtype), bit_count)) { fail("has more than 2^64-1 bits"); }
    if (bit_count % 8 != 0) {
        fail(message("of dtype ", to_string(t.dtype), " has ", bit_count, " bits; expected whole bytes"));
    }
    if (end - begin != bit_count / 8) {
        fail(message("of dtype ", to_string(t.dtype), " and shape ", to_string(shape), " needs ", bit_count / 8,
            " bytes; its data_offsets give it ", end - begin));
    }
    return {std::move(t.name), t.dtype, std::move(shape), data_offset + begin, end - begin};
}

} // namespace detail

/// Reads and checks the header of a safetensors file that lies in memory, by the rules of the reference reader: header
/// of at most 100,000,000 bytes, UTF-8 JSON nested at most 127 deep, ranges that tile the buffer without hole or
/// overlap, products checked for overflow, sizes that match. Leading white space, unknown keys of a tensor, empty
/// tensors, scalars, any rank, any order of tensors and unaligned data are valid. Stricter than the reference in four
/// points: a key that occurs twice, a tensor described by a JSON array instead of an object, a dtype that is no string,
/// and an extent above 2^63-1 are refused. Throws format_error naming `file` and the tensor. Cost: O(header).
[[nodiscard]] inline safetensors_header parse_safetensors(std::span<const std::byte> bytes, std::string_view file)
{
    const auto fail = [&](error_code code, const std::string& what, std::uint64_t offset) {
        raise<format_error>(code, what, std::string(file), offset);
    };
    std::uint64_t length = 0;
    if (bytes.size() >= 8) { std::memcpy(&length, bytes.data(), 8); }
    if (bytes.size() < 8 || length > safetensors_header_limit || length > bytes.size() - 8 || length == 0) {
        if (const auto kind = what_is_this_file(bytes)) { fail(error_code::not_safetensors, kind->sentence(), 0); }
    }
    if (bytes.size() < 8) {
        fail(error_code::file_truncated,
            message("has ", bytes.size(), " bytes; a safetensors file has at least 8: fetch it again"), 0);
    }
    if (length > safetensors_header_limit) {
        fail(error_code::not_safetensors,
            message("claims a header of ", length, " bytes; at most ", safetensors_header_limit,
                " are allowed: this is not a safetensors file, or a damaged one"),
            0);
    }
    if (length > bytes.size() - 8) {
        fail(error_code::file_truncated,
            message("claims a header of ", length, " bytes and has ", bytes.size() - 8,
                " after it: the file is cut short; fetch it again"),
            0);
    }

    detail::safetensors_events events(file);
    detail::sax_parse_strictly(
        {reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<std::size_t>(length)}, events);

    safetensors_header header;
    header.metadata = std::move(events.metadata);
    header.data_offset = 8 + length;
    std::stable_sort(
        events.tensors.begin(), events.tensors.end(), [](const auto& a, const auto& b) { return a.range < b.range; });
    header.entries.reserve(events.tensors.size());
    std::uint64_t end = 0;
    for (auto& tensor : events.tensors) {
        header.entries.push_back(detail::check_tensor(std::move(tensor), end, header.data_offset, file));
        end += header.entries.back().bytes;
    }
    if (const std::uint64_t present = bytes.size() - header.data_offset; end != present) {
        fail(end > present ? error_code::file_truncated : error_code::tensor_offsets,
            message("has ", present, " bytes of tensor data; its header describes ", end,
                end > present ? ": the file is cut short; fetch it again" : ""),
            header.data_offset);
    }
    return header;
}

/// A safetensors file, mapped. Tensors are views into the map and live as long as this object (moving it keeps them).
/// A view's address is aligned to its dtype only if the file aligned it.
///
///     taskvec::safetensors_file file("model.safetensors");
///     for (const auto& [name, tensor] : file.model()) { … }
///
/// Throws io_error, format_error. Cost: O(header); no tensor byte is read.
class safetensors_file {
public:
    /// Maps the file and checks its header.
    explicit safetensors_file(std::filesystem::path path)
        : map_(std::move(path))
        , header_(parse_safetensors(map_.bytes(), map_.path().string()))
    { }
    /// A file of another format whose tensors lie in it as they do here: `header` was read from it, and checked against
    /// its bytes (formats/pytorch.hpp).
    safetensors_file(mapped_file map, safetensors_header header)
        : map_(std::move(map))
        , header_(std::move(header))
    { }
    /// The same, with some tensors laid out anew: those whose offset is `size of the file + n` lie at byte n of `more`.
    safetensors_file(mapped_file map, safetensors_header header, std::shared_ptr<const std::byte> more)
        : map_(std::move(map))
        , header_(std::move(header))
        , more_(std::move(more))
    { }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return map_.path(); }
    /// The file's path.
    [[nodiscard]] std::filesystem::path path() && { return map_.path(); }
    /// The map itself.
    [[nodiscard]] const mapped_file& map() const& noexcept { return map_; }
    void map() const&& = delete; // name the owner first: its views would dangle
    /// The tensors in the order of their bytes in the file.
    [[nodiscard]] const std::vector<safetensors_entry>& entries() const& noexcept { return header_.entries; }
    [[nodiscard]] std::vector<safetensors_entry> entries() && { return std::move(header_.entries); }
    /// What __metadata__ has.
    [[nodiscard]] const metadata_map& metadata() const& noexcept { return header_.metadata; }
    /// What __metadata__ has.
    [[nodiscard]] metadata_map metadata() && { return std::move(header_.metadata); }
    /// Bytes of the tensors together.
    [[nodiscard]] std::uint64_t data_bytes() const noexcept { return map_.bytes().size() - header_.data_offset; }
    void tensor(const safetensors_entry&) const&& = delete; // name the owner first: its views would dangle
    /// A tensor of entries(), as a view into the map.
    [[nodiscard]] const_tensor_ref tensor(const safetensors_entry& entry) const&
    {
        const auto size = map_.bytes().size();
        const auto* const data =
            more_ && entry.offset >= size ? more_.get() + (entry.offset - size) : map_.bytes().data() + entry.offset;
        return {data, entry.dtype, entry.shape, {}, memory_space::host, 0};
    }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// All tensors, by name.
    [[nodiscard]] const_model_ref model() const&
    {
        std::vector<const safetensors_entry*> sorted;
        for (const auto& entry : header_.entries) { sorted.push_back(&entry); }
        std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->name < b->name; });
        const_model_ref result;
        for (const auto* entry : sorted) { result.insert(entry->name, tensor(*entry)); }
        return result;
    }

private:
    mapped_file map_;
    safetensors_header header_;
    std::shared_ptr<const std::byte> more_;
};

/// The header bytes (length included) of a file that holds `specs`, and where each tensor's bytes go.
struct safetensors_layout {
    std::string head; ///< length and header
    std::vector<std::uint64_t> offsets; ///< for each spec, from the beginning of the file
    std::uint64_t size = 0; ///< of the whole file
};
/// Whether a file has this head and size.
[[nodiscard]] inline bool is_laid_out(const std::filesystem::path& path, const safetensors_layout& layout)
{
    const mapped_file file(path);
    const auto bytes = file.bytes();
    return bytes.size() == layout.size && std::memcmp(bytes.data(), layout.head.data(), layout.head.size()) == 0;
}

/// Lays a file out as the reference writer does: tensors by dtype (its enum, descending), then by name; `__metadata__`
/// first; the header padded with spaces to a multiple of 8. `format` is set to "pt" unless the metadata has it already.
/// Throws invalid_argument for a name that occurs twice, is "__metadata__", or is not UTF-8.
[[nodiscard]] inline safetensors_layout layout_safetensors(
    const std::vector<tensor_spec>& specs, metadata_map metadata = {})
{
    metadata.try_emplace("format", "pt");
    std::vector<std::size_t> order(specs.size());
    for (std::size_t i = 0; i < order.size(); ++i) { order[i] = i; }
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return specs[a].dtype != specs[b].dtype ? specs[a].dtype > specs[b].dtype : specs[a].name < specs[b].name;
    });

    std::string json = "{\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
        json += (json.back() == '{' ? "" : ",") + json_string(key) + ":" + json_string(value);
    }
    json += '}';
    safetensors_layout layout;
    layout.offsets.resize(specs.size());
    std::uint64_t at = 0;
    std::set<std::string_view> names{"__metadata__"};
    for (const auto index : order) {
        const auto& spec = specs[index];
        if (!names.insert(spec.name).second) {
            raise<invalid_argument>(spec.name == "__metadata__" ? error_code::unwritable : error_code::tensor_repeated,
                spec.name == "__metadata__" ? "a tensor cannot be called '__metadata__'"
                                            : message("tensor '", spec.name, "' would be written twice"));
        }
        const std::uint64_t count = spec.size();
        std::uint64_t bit_count = 0, end = 0;
        if (detail::product_wraps(count, bits_per_element(spec.dtype), bit_count)
            || detail::sum_wraps(at, bit_count / 8, end)) {
            raise<invalid_argument>(error_code::unwritable,
                message("tensor '", spec.name, "' of shape ", to_string(spec.shape), " is too large for a file"));
        }
        if (bit_count % 8 != 0) {
            raise<invalid_argument>(error_code::unwritable,
                message("tensor '", spec.name, "' of dtype ", to_string(spec.dtype), " does not fill whole bytes"));
        }
        json += ',' + json_string(spec.name) + ":{\"dtype\":\"" + std::string(to_string(spec.dtype)) + "\",\"shape\":[";
        for (std::size_t i = 0; i < spec.shape.size(); ++i) { json += message(i ? "," : "", spec.shape[i]); }
        json += "],\"data_offsets\":[" + std::to_string(at) + ',' + std::to_string(end) + "]}";
        layout.offsets[index] = at;
        at = end;
    }
    json += '}';
    json.append((8 - json.size() % 8) % 8, ' ');
    const std::uint64_t length = json.size();
    if (length > safetensors_header_limit) {
        raise<invalid_argument>(error_code::unwritable,
            message("the header would have ", length, " bytes; a safetensors header has at most ",
                safetensors_header_limit, ": write several files"));
    }
    layout.head.resize(8);
    std::memcpy(layout.head.data(), &length, 8);
    layout.head += json;
    for (auto& offset : layout.offsets) { offset += layout.head.size(); }
    layout.size = layout.head.size() + at;
    return layout;
}

/// Writes one safetensors file: reserves it under a temporary name, takes the tensors' bytes in any order and from any
/// thread, and gives it its name on commit(). See atomic_file for what a crash leaves, and for replacing an input.
///
///     taskvec::safetensors_writer out("merged.safetensors", {{"w", taskvec::dtype::f32, {2, 2}}});
///     out.write(0, 0, data, 16);
///     out.commit();
class safetensors_writer final : public tensor_sink {
public:
    /// Tensor `index` of write() is specs[index], whatever its place in the file.
    /// Throws invalid_argument (see layout_safetensors) before anything is created, and io_error.
    safetensors_writer(std::filesystem::path target, const std::vector<tensor_spec>& specs, metadata_map metadata = {},
        durability mode = durability::synchronised)
        : safetensors_writer(std::move(target), specs, layout_safetensors(specs, std::move(metadata)), mode)
    { }
    /// A file that is written already, with these tensors and this metadata: only commit() is left. Throws
    /// format_error where it has others.
    safetensors_writer(std::filesystem::path target, const std::vector<tensor_spec>& specs, metadata_map metadata,
        durability mode, const std::filesystem::path& finished)
        : safetensors_writer(std::move(target), specs, layout_safetensors(specs, std::move(metadata)), mode, finished)
    { }

    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        if (index >= sizes_.size() || offset > sizes_[index] || size > sizes_[index] - offset) {
            raise<invalid_argument>(error_code::index_out_of_range,
                message("a write of ", size, " bytes at ", offset, " lies outside tensor ", index, " of '",
                    file_.target().string(), "'"));
        }
        if (on_demand_ && whole_.load(std::memory_order_acquire)) { // a walk that settles its sums writes some again
            const detail::light_lock lock(busy_);
            file_.open_again();
            file_.write(offsets_[index] + offset, data, size);
            file_.close_for_now();
            return;
        }
        if (on_demand_ && !open_.load(std::memory_order_acquire)) {
            const detail::light_lock lock(busy_);
            if (!open_.load(std::memory_order_relaxed)) {
                file_.open_again();
                open_.store(true, std::memory_order_release);
            }
        }
        file_.write(offsets_[index] + offset, data, size);
        // Before the first byte is written again all have been written once: whoever writes the last one is the only
        // one left.
        if (written_.fetch_add(size, std::memory_order_acq_rel) + size == expected_ && on_demand_ && size) {
            file_.close_for_now();
            whole_.store(true, std::memory_order_release);
        }
    }
    /// Has the file open from its first write to its last only, for those who write more files than a process may have
    /// open. Before the first write.
    void open_on_demand()
    {
        file_.close_for_now();
        on_demand_ = true;
    }

    /// Forces the bytes to disk, so that commit() only renames. Throws invalid_argument if fewer bytes were written
    /// than the tensors have.
    void finish()
    {
        if (const auto written = written_.load(); written < expected_) {
            raise<invalid_argument>(error_code::call_order,
                message("'", file_.target().string(), "' is incomplete: ", written, " of ", expected_,
                    " bytes were written"));
        }
        file_.finish();
    }
    /// Gives the file its name. Nothing may be written afterwards.
    void commit(bool whole_directory = true)
    {
        finish();
        file_.commit(whole_directory);
    }

    /// The path that commit() gives the file.
    [[nodiscard]] const std::filesystem::path& target() const noexcept { return file_.target(); }
    /// The name that the file has until commit(); empty afterwards.
    [[nodiscard]] const std::filesystem::path& temporary() const noexcept { return file_.temporary(); }
    /// Bytes of the whole file.
    [[nodiscard]] std::uint64_t file_size() const noexcept { return size_; }

private:
    safetensors_writer(
        std::filesystem::path target, const std::vector<tensor_spec>& specs, safetensors_layout layout, durability mode)
        : file_(std::move(target), layout.size, mode)
        , offsets_(std::move(layout.offsets))
        , size_(layout.size)
        , expected_(layout.size - layout.head.size())
    {
        sizes_.reserve(specs.size());
        for (const auto& spec : specs) { sizes_.push_back(spec.bytes()); }
        file_.write(0, layout.head.data(), layout.head.size());
    }

    safetensors_writer(std::filesystem::path target, const std::vector<tensor_spec>& specs, safetensors_layout layout,
        durability mode, const std::filesystem::path& finished)
        : file_(std::move(target), 0, mode)
        , offsets_(std::move(layout.offsets))
        , size_(layout.size)
        , expected_(layout.size - layout.head.size())
        , written_(layout.size - layout.head.size())
    {
        for (const auto& spec : specs) { sizes_.push_back(spec.bytes()); }
        if (!is_laid_out(finished, layout)) {
            raise<format_error>(
                error_code::file_tensors, "holds other tensors than are to be written", finished.string());
        }
        file_.take(finished);
    }

    atomic_file file_;
    std::vector<std::uint64_t> offsets_, sizes_;
    std::uint64_t size_, expected_;
    std::atomic<std::uint64_t> written_{0};
    bool on_demand_ = false;
    std::atomic<bool> open_{false}; ///< once and for all, where the file is opened on demand
    std::atomic<bool> whole_{false}; ///< every byte has been written, and the file is closed again
    std::atomic_flag busy_;
};

/// Writes a whole model that lies in memory. The tensors must be contiguous host memory.
///
///     taskvec::write_safetensors("model.safetensors", model, {{"step", "100"}});
inline void write_safetensors(const std::filesystem::path& path, const const_model_ref& model,
    metadata_map metadata = {}, durability mode = durability::synchronised)
{
    std::vector<tensor_spec> specs;
    for (const auto& [name, tensor] : model) {
        if (tensor.space != memory_space::host || !tensor.contiguous()) {
            raise<invalid_argument>(
                error_code::tensor_layout, message("tensor '", name, "' is not contiguous host memory; copy it first"));
        }
        if (tensor.source) { detail::refuse_source(name); }
        specs.push_back({name, tensor.dtype, tensor.shape});
    }
    safetensors_writer writer(path, specs, std::move(metadata), mode);
    for (std::size_t i = 0; i < specs.size(); ++i) { writer.write(i, 0, model[i].tensor.data, specs[i].bytes()); }
    writer.commit();
}

} // namespace taskvec::inline TASKVEC_ABI
