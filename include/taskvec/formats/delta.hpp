// Deltas on disk: the kept entries of residuals, as a plain safetensors file that any reader can open.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/select/sparse.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <memory_resource>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The value of the metadata key `schema` that this version writes and reads.
inline constexpr std::string_view delta_schema = "taskvec.delta.1";

/// A model's kept entries, with the fingerprint of the base that they are to be added to.
struct delta {
    sparse_model tensors; ///< by name of the base's tensors
    std::uint64_t base_fingerprint = 0; ///< see fingerprint()
    metadata_map metadata{}; ///< further keys to write; on reading, all keys of the file
};

namespace detail {

/// True when a bit for each element takes less room than four bytes for each kept one.
[[nodiscard]] constexpr bool stored_as_bitmask(std::uint64_t kept, std::uint64_t size) noexcept
{
    return kept > size / 32;
}

} // namespace detail

/// Writes a delta as its entries come, in pieces, in any order and from several threads. For each tensor P: `P.values`
/// (F32, or F64), `P.shape` (I64), and the places of the values as `P.indices` (I32; I64 for tensors of more than
/// 2^31 - 1 elements; ascending, row-major flat) or, where more than 1/32 of the entries are kept, `P.bitmask` (U8,
/// ceil(size / 8) bytes; bit i%8 of byte i/8, least significant first, is set where entry i is kept; the bits beyond
/// the last entry are 0). Metadata: `schema` "taskvec.delta.1", `additive` "true", `fingerprint` of the base (see
/// fingerprint(), "xxh64:" and 16 hexadecimal digits). Atomic like safetensors_writer. Memory: a piece.
///
///     delta_writer out("task.delta.safetensors", fingerprint(cpu{}, base));
///     post_pruning(cpu{}, {.density = 0.1}, models, out);
///     out.commit();
class delta_writer final : public sparse_sink {
public:
    /// What is known of a tensor before its entries come.
    struct part {
        std::string name; ///< of the base's tensor
        extents shape; ///< of the tensor
        std::uint64_t kept = 0; ///< entries
        bool wide = false; ///< f64 values
    };

    /// `path`: the file. Nothing is opened before begin().
    delta_writer(std::filesystem::path path, std::uint64_t base_fingerprint, metadata_map metadata = {},
        durability mode = durability::synchronised)
        : path_(std::move(path))
        , metadata_(std::move(metadata))
        , mode_(mode)
    {
        metadata_["schema"] = delta_schema;
        metadata_["additive"] = "true";
        metadata_["fingerprint"] = fingerprint_text(base_fingerprint);
    }

    /// Where the models are to be finite and overflow is not to pass, entries have to be finite too: models that are
    /// may differ by more than their arithmetic holds. Throws nonfinite_error for one that is not, when it comes.
    void begin(const aligned_models& models, std::span<const std::uint64_t> kept) override
    {
        finite_ =
            models.options().on_nonfinite == nonfinite::error && models.options().on_overflow != overflow::propagate;
        std::vector<part> parts;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            parts.push_back({tensor.name, tensor.shape, kept[i], tensor.wide_base()});
        }
        begin(std::move(parts));
    }
    /// Creates the file. Throws invalid_argument, io_error.
    void begin(std::vector<part> parts)
    {
        parts_ = std::move(parts);
        std::vector<tensor_spec> specs;
        for (const auto& [name, shape, kept, wide] : parts_) {
            const std::uint64_t size = element_count(shape, name);
            if (kept > size) {
                raise<invalid_argument>(error_code::delta_entries,
                    message("delta of tensor '", name, "' keeps ", kept, " of ", size, " entries"));
            }
            const auto count = static_cast<std::int64_t>(kept);
            specs.push_back({name + ".values", wide ? dtype::f64 : dtype::f32, {count}});
            specs.push_back({name + ".shape", dtype::i64, {static_cast<std::int64_t>(shape.size())}});
            if (detail::stored_as_bitmask(kept, size)) {
                specs.push_back(
                    {name + ".bitmask", dtype::u8, {static_cast<std::int64_t>(size / 8 + (size % 8 != 0))}});
            }
            else {
                specs.push_back({name + ".indices",
                    size > std::uint64_t{std::numeric_limits<std::int32_t>::max()} ? dtype::i64 : dtype::i32, {count}});
            }
            places_.push_back(specs.back().dtype);
        }
        file_ = std::make_unique<safetensors_writer>(path_, specs, metadata_, mode_);
        for (std::size_t i = 0; i < parts_.size(); ++i) {
            file_->write(3 * i + 1, 0, parts_[i].shape.data(), specs[3 * i + 1].bytes());
        }
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const float* values, std::size_t n) override
    {
        store(tensor, first, from, to, indices, values, n);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const double* values, std::size_t n) override
    {
        store(tensor, first, from, to, indices, values, n);
    }
    /// Forces the file to disk, so that commit() only renames.
    void finish() { file().finish(); }
    /// Gives the file its name.
    void commit() { file().commit(); }
    /// The file's path.
    [[nodiscard]] const std::filesystem::path& target() const noexcept { return path_; }
    /// What begin() was told.
    [[nodiscard]] const std::vector<part>& parts() const noexcept { return parts_; }
    /// Entries in all tensors.
    [[nodiscard]] std::uint64_t kept() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& each : parts_) { total += each.kept; }
        return total;
    }
    /// The name that the file has until commit(); empty before begin().
    [[nodiscard]] std::filesystem::path temporary() const
    {
        return file_ ? file_->temporary() : std::filesystem::path();
    }
    /// Bytes of the file; 0 before begin().
    [[nodiscard]] std::uint64_t file_size() const noexcept { return file_ ? file_->file_size() : 0; }

private:
    safetensors_writer& file()
    {
        if (!file_) {
            raise<invalid_argument>(error_code::call_order, message("'", path_.string(), "': no delta was begun"));
        }
        return *file_;
    }
    template <class A>
    void store(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const A* values, std::size_t n)
    {
        if (parts_[tensor].wide != std::same_as<A, double>) {
            raise<invalid_argument>(error_code::call_order,
                message("delta of tensor '", parts_[tensor].name, "' was begun with other values"));
        }
        for (std::size_t i = 0; finite_ && i < n; ++i) {
            if (std::isfinite(values[i])) { continue; }
            raise<nonfinite_error>(error_code::result_overflow,
                message("tensor '", parts_[tensor].name, "' differs by infinity at index ", indices[i],
                    " though both models are finite there: their difference is beyond ", to_string(dtype_of<A>),
                    "; let it propagate (overflow)"));
        }
        file().write(3 * tensor, first * sizeof(A), values, n * sizeof(A));
        if (places_[tensor] == dtype::u8) {
            std::array<std::uint8_t, 16384> bytes;
            std::size_t i = 0;
            for (std::uint64_t at = from / 8; at * 8 < to; at += bytes.size()) {
                const std::uint64_t length = std::min<std::uint64_t>(bytes.size(), to / 8 + (to % 8 != 0) - at);
                std::fill_n(bytes.begin(), length, std::uint8_t{0});
                for (; i < n && indices[i] / 8 < at + length; ++i) {
                    auto& byte = bytes[indices[i] / 8 - at];
                    byte = static_cast<std::uint8_t>(byte | (1u << (indices[i] % 8)));
                }
                file_->write(3 * tensor + 2, at, bytes.data(), length);
            }
        }
        else if (places_[tensor] == dtype::i32) {
            std::array<std::int32_t, 4096> narrow;
            for (std::size_t at = 0; at < n; at += narrow.size()) {
                const std::size_t length = std::min(narrow.size(), n - at);
                std::transform(indices + at, indices + at + length, narrow.begin(),
                    [](std::uint64_t index) { return static_cast<std::int32_t>(index); });
                file_->write(
                    3 * tensor + 2, (first + at) * sizeof(std::int32_t), narrow.data(), length * sizeof(std::int32_t));
            }
        }
        else {
            file_->write(3 * tensor + 2, first * sizeof(std::int64_t), indices, n * sizeof(std::int64_t));
        }
    }

    std::filesystem::path path_;
    metadata_map metadata_;
    durability mode_;
    std::vector<part> parts_;
    std::vector<dtype> places_;
    bool finite_ = false; ///< entries that are not finite are refused
    std::unique_ptr<safetensors_writer> file_;
};

/// Writes a delta that lies in memory; see delta_writer for the format.
/// Throws invalid_argument for a sparse vector that breaks its own promises; io_error.
inline void write_delta(
    const std::filesystem::path& path, const delta& content, durability mode = durability::synchronised)
{
    std::vector<delta_writer::part> parts;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&, &name = name]<class A>(const sparse_vector<A>& sparse) { // clang 14 captures no structured binding
                check_sparse(sparse, name);
                parts.push_back({name, sparse.shape, sparse.kept(), std::same_as<A, double>});
            },
            tensor);
    }
    delta_writer writer(path, content.base_fingerprint, content.metadata, mode);
    writer.begin(std::move(parts));
    std::size_t at = 0;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&, &name = name](const auto& sparse) {
                const std::uint64_t size = element_count(sparse.shape, name);
                constexpr std::uint64_t piece = std::uint64_t{1} << 20;
                std::vector<std::uint64_t> places;
                std::size_t first = 0;
                const bool bits = detail::stored_as_bitmask(sparse.kept(), size);
                for (std::uint64_t from = 0; from < size && (bits || first < sparse.kept()); from += piece) {
                    if (!bits) { from = sparse.indices[first] / piece * piece; } // nothing is stored of a run of zeros
                    const std::uint64_t to = from + std::min(size - from, piece);
                    places.clear();
                    for (std::size_t i = first; i < sparse.kept() && sparse.indices[i] < to; ++i) {
                        places.push_back(sparse.indices[i]);
                    }
                    writer.write(at, first, from, to, places.data(), sparse.values.data() + first, places.size());
                    first += places.size();
                }
            },
            tensor);
        ++at;
    }
    writer.commit();
}

/// A delta file, mapped and checked: schema, dtypes, counts that match, indices in range and ascending, zero bits
/// beyond the last entry, no tensor left over. Its entries stay in the file; see delta_writer for the format.
/// Move-only; parts() are views into it. Throws format_error naming the file and the tensor; io_error. Cost: one read
/// of the places, O(tensors) memory and a number for each 65,536 elements of a bitmask.
///
///     const taskvec::delta_file delta("task.delta.safetensors");
///     taskvec::add_delta(cpu{}, models, delta.parts(), 1.0, sink);   // <taskvec/reuse/sparse_addition.hpp>
class delta_file {
public:
    /// What the file holds for one tensor of the base.
    using part = sparse_view;

    /// Maps and checks the file.
    explicit delta_file(std::filesystem::path path)
        : file_(std::move(path))
        , model_(file_.model())
    {
        const auto value = [&](const char* key) {
            const auto place = file_.metadata().find(key);
            return place == file_.metadata().end() ? std::string() : place->second;
        };
        const auto fail_file = [&](const std::string& what) {
            raise<format_error>(error_code::delta_format, what, file_.path().string());
        };
        if (const auto schema = value("schema"); schema != delta_schema) {
            fail_file(schema.empty() ? message("is not a delta: its metadata has no schema '", delta_schema, "'")
                                     : message("has schema '", schema, "'; this version reads '", delta_schema, "'"));
        }
        if (const auto additive = value("additive"); additive != "true") {
            fail_file(message("has additive '", additive, "'; this version reads 'true'"));
        }
        const auto stamp = parse_fingerprint(value("fingerprint"));
        if (!stamp) {
            fail_file(message(
                "has the fingerprint '", value("fingerprint"), "'; expected 'xxh64:' and 16 hexadecimal digits"));
        }
        fingerprint_ = *stamp;
        for (const auto& [label, tensor] : model_) {
            if (label.ends_with(".shape")) { parts_.push_back(read_part(label.substr(0, label.size() - 6), tensor)); }
        }
        std::sort(parts_.begin(), parts_.end(), [](const part& a, const part& b) { return a.name < b.name; });
        if (3 * parts_.size() != model_.size()) { fail_stray(); }
    }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return file_.path(); }
    /// The file's path.
    [[nodiscard]] std::filesystem::path path() && { return file_.path(); }
    /// The file itself.
    [[nodiscard]] const safetensors_file& file() const& noexcept { return file_; }
    void file() const&& = delete; // name the owner first: its views would dangle
    /// All keys of the file's metadata.
    [[nodiscard]] const metadata_map& metadata() const& noexcept { return file_.metadata(); }
    /// All keys of the file's metadata.
    [[nodiscard]] metadata_map metadata() && { return std::move(file_).metadata(); }
    /// Of the base that the delta is to be added to.
    [[nodiscard]] std::uint64_t base_fingerprint() const noexcept { return fingerprint_; }
    /// In name order.
    [[nodiscard]] const std::vector<part>& parts() const& noexcept { return parts_; }
    void parts() const&& = delete; // name the owner first: its views would dangle
    void find(std::string_view) const&& = delete; // name the owner first: its views would dangle
    /// The part of a tensor, or null where the delta leaves it as it is.
    [[nodiscard]] const part* find(std::string_view name) const& noexcept { return detail::find_by_name(parts_, name); }
    /// Entries in all tensors.
    [[nodiscard]] std::uint64_t kept() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& each : parts_) { total += each.kept; }
        return total;
    }

private:
    [[noreturn]] void fail(std::string_view stem, const std::string& what) const
    {
        raise<format_error>(
            error_code::delta_format, message("delta of tensor '", stem, "' ", what), file_.path().string());
    }
    [[noreturn]] void fail_stray() const
    {
        for (const auto& [label, tensor] : model_) {
            const auto dot = label.rfind('.');
            const auto role = dot == label.npos ? std::string() : label.substr(dot);
            const bool known = role == ".shape" || role == ".values" || role == ".indices" || role == ".bitmask";
            if (!known || !find(std::string_view(label).substr(0, dot))) {
                raise<format_error>(error_code::delta_format,
                    message("holds '", label,
                        "', which belongs to no delta tensor (there must be P.values, P.shape, and "
                        "P.indices or P.bitmask)"),
                    file_.path().string());
            }
        }
        raise<format_error>(error_code::delta_format, "holds tensors that belong to no delta", file_.path().string());
    }

    [[nodiscard]] part read_part(const std::string& stem, const const_tensor_ref& shape)
    {
        part result;
        result.name = stem;
        const auto* const values = model_.find(stem + ".values");
        if (!values) { fail(stem, message("has '", stem, ".shape' and no '", stem, ".values'")); }
        if (values->dtype != dtype::f32 && values->dtype != dtype::f64) {
            fail(stem, message("has values of dtype ", to_string(values->dtype), "; expected F32 or F64"));
        }
        if (values->shape.size() != 1) {
            fail(stem, message("has values of rank ", values->shape.size(), "; expected 1"));
        }
        result.wide = values->dtype == dtype::f64;
        result.values = static_cast<const std::byte*>(values->data);
        result.kept = values->size();
        read_shape(result, shape);
        const auto* const indices = model_.find(stem + ".indices");
        const auto* const bitmask = model_.find(stem + ".bitmask");
        if (!indices == !bitmask) {
            fail(stem, indices ? "has both indices and a bitmask" : "has neither indices nor a bitmask");
        }
        if (indices) { read_indices(result, *indices); }
        else {
            read_bitmask(result, *bitmask);
        }
        return result;
    }

    void read_shape(part& result, const const_tensor_ref& shape) const
    {
        if (shape.dtype != dtype::i64 || shape.shape.size() != 1) {
            fail(result.name,
                message("has a shape of dtype ", to_string(shape.dtype), " and rank ", shape.shape.size(),
                    "; expected I64 of rank 1"));
        }
        result.shape.resize(shape.size());
        bool empty = false;
        for (std::size_t i = 0; i < result.shape.size(); ++i) {
            const auto extent = detail::load<std::int64_t>(shape.data, i);
            if (extent < 0) { fail(result.name, message("has the negative extent ", extent)); }
            result.shape[i] = extent;
            empty = empty || extent == 0;
        }
        result.size = empty ? 0 : 1;
        for (const auto extent : result.shape) {
            if (!empty
                && (detail::product_wraps(result.size, static_cast<std::uint64_t>(extent), result.size)
                    || result.size > detail::most_elements)) {
                fail(result.name, message("has a shape of more than ", detail::most_elements_text));
            }
        }
    }

    void read_indices(part& result, const const_tensor_ref& tensor) const
    {
        if ((tensor.dtype != dtype::i32 && tensor.dtype != dtype::i64) || tensor.shape.size() != 1) {
            fail(result.name,
                message("has indices of dtype ", to_string(tensor.dtype), " and rank ", tensor.shape.size(),
                    "; expected I32 or I64 of rank 1"));
        }
        if (tensor.size() != result.kept) {
            fail(result.name, message("has ", tensor.size(), " indices for ", result.kept, " values"));
        }
        result.indices = static_cast<const std::byte*>(tensor.data);
        result.wide_indices = tensor.dtype == dtype::i64;
        std::int64_t previous = -1;
        for (std::uint64_t i = 0; i < result.kept; ++i) {
            const std::int64_t index = result.wide_indices ? detail::load<std::int64_t>(tensor.data, i)
                                                           : detail::load<std::int32_t>(tensor.data, i);
            if (index < 0 || static_cast<std::uint64_t>(index) >= result.size) {
                fail(result.name,
                    message("has index ", index, " at position ", i, "; the tensor has ", result.size, " elements"));
            }
            if (index <= previous) {
                fail(result.name,
                    message("has index ", index, " after ", previous, " at position ", i, "; indices must ascend"));
            }
            previous = index;
        }
    }

    void read_bitmask(part& result, const const_tensor_ref& tensor)
    {
        if (tensor.dtype != dtype::u8 || tensor.shape.size() != 1) {
            fail(result.name,
                message("has a bitmask of dtype ", to_string(tensor.dtype), " and rank ", tensor.shape.size(),
                    "; expected U8 of rank 1"));
        }
        const std::uint64_t bytes = tensor.size(), needed = result.size / 8 + (result.size % 8 != 0);
        if (bytes != needed) {
            fail(result.name, message("has a bitmask of ", bytes, " bytes; ", result.size, " elements need ", needed));
        }
        result.bitmask = static_cast<const std::uint8_t*>(tensor.data);
        std::uint64_t set = 0;
        auto& before = before_.emplace_back();
        for (std::uint64_t i = 0; i < bytes; ++i) {
            if (i % (part::run / 8) == 0) { before.push_back(set); }
            set += static_cast<unsigned>(std::popcount(result.bitmask[i]));
        }
        result.before = before;
        if (set != result.kept) { fail(result.name, message("has ", set, " bits set for ", result.kept, " values")); }
        if (result.size % 8 && (result.bitmask[bytes - 1] >> (result.size % 8)) != 0) {
            fail(result.name, "has bits set beyond its last element");
        }
    }

    safetensors_file file_;
    const_model_ref model_;
    std::vector<std::vector<std::uint64_t>> before_; // what the parts' `before` show
    std::vector<part> parts_;
    std::uint64_t fingerprint_ = 0;
};

/// Reads a whole delta into memory, which comes from `memory`. Errors: as delta_file.
[[nodiscard]] inline delta read_delta(
    const std::filesystem::path& path, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
{
    const delta_file file(path);
    delta result;
    result.base_fingerprint = file.base_fingerprint();
    result.metadata = file.metadata();
    for (const auto& part : file.parts()) {
        const auto make = [&]<class A>(std::type_identity<A>) {
            sparse_vector<A> sparse{
                part.shape, index_list(part.kept, part.size, memory), std::pmr::vector<A>(part.kept, memory)};
            part.for_each(0, part.size, [&](std::uint64_t index, std::uint64_t entry) {
                sparse.indices.store(entry, &index, 1);
                sparse.values[entry] = part.template value<A>(entry);
            });
            result.tensors.emplace(part.name, std::move(sparse));
        };
        if (part.wide) { make(std::type_identity<double>{}); }
        else {
            make(std::type_identity<float>{});
        }
    }
    return result;
}

/// Throws invalid_argument unless `base` is the model with this fingerprint. Cost: one read of the base's bytes.
inline void check_base(const cpu& policy, std::uint64_t base_fingerprint, const const_model_ref& base,
    std::string_view delta_name = "delta", std::string_view base_name = "base")
{
    if (const auto found = fingerprint(policy, base); found != base_fingerprint) {
        raise<invalid_argument>(error_code::fingerprint_differs,
            message("'", base_name, "' is not the model that '", delta_name, "' was made for: its fingerprint is ",
                fingerprint_text(found), "; expected ", fingerprint_text(base_fingerprint)));
    }
}

} // namespace taskvec::inline TASKVEC_ABI
