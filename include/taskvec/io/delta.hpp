// Deltas on disk: the kept entries of residuals, as a plain safetensors file that any reader can open.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/io/checkpoint.hpp>
#include <taskvec/io/fingerprint.hpp>
#include <taskvec/select/sparse.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The value of the metadata key `schema` that this version writes and reads.
inline constexpr std::string_view delta_schema = "taskvec.delta.1";

/// A model's kept entries, with the fingerprint of the base that they are to be added to.
struct delta {
    sparse_model tensors;
    std::uint64_t base_fingerprint = 0;
    metadata_map metadata{}; ///< further keys to write; on reading, all keys of the file
};

namespace detail {

/// True when a bit for each element takes less room than four bytes for each kept one.
[[nodiscard]] constexpr bool stored_as_bitmask(std::uint64_t kept, std::uint64_t size) noexcept
{
    return kept > size / 32;
}

/// A value of T from memory of any alignment.
template <class T>
[[nodiscard]] T load(const void* data, std::size_t index) noexcept
{
    T value;
    std::memcpy(&value, static_cast<const std::byte*>(data) + index * sizeof(T), sizeof(T));
    return value;
}

} // namespace detail

/// Writes a delta as its entries come, in pieces, in any order and from several threads. For each tensor P: `P.values`
/// (F32, or F64), `P.shape` (I64), and the places of the values as `P.indices` (I32; I64 for tensors of more than
/// 2^31 - 1 elements; ascending, row-major flat) or, where more than 1/32 of the entries are kept, `P.bitmask` (U8, ceil(size / 8)
/// bytes; bit i%8 of byte i/8, least significant first, is set where entry i is kept; the bits beyond the last entry are 0).
/// Metadata: `schema` "taskvec.delta.1", `additive` "true", `fingerprint` of the base (see fingerprint(), "xxh64:" and 16
/// hexadecimal digits). Atomic like safetensors_writer. Memory: a piece.
///
///     delta_writer out("task.delta.safetensors", fingerprint(cpu{}, base));
///     post_pruning(cpu{}, {.density = 0.1}, models, out);
///     out.commit();
class delta_writer final : public sparse_sink {
public:
    /// What is known of a tensor before its entries come.
    struct part {
        std::string name;
        extents shape;
        std::uint64_t kept = 0;
        bool wide = false; ///< f64 values
    };

    delta_writer(std::filesystem::path path, std::uint64_t base_fingerprint, metadata_map metadata = {}, durability mode = durability::synchronised)
        : path_(std::move(path))
        , metadata_(std::move(metadata))
        , mode_(mode)
    {
        metadata_["schema"] = delta_schema;
        metadata_["additive"] = "true";
        metadata_["fingerprint"] = fingerprint_text(base_fingerprint);
    }

    void begin(const aligned_models& models, const std::vector<std::uint64_t>& kept) override
    {
        std::vector<part> parts;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            parts.push_back({tensor.name, tensor.shape, kept[i], tensor.wide});
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
            if (kept > size) { raise<invalid_argument>(message("delta of tensor '", name, "' keeps ", kept, " of ", size, " entries")); }
            const auto count = static_cast<std::int64_t>(kept);
            specs.push_back({name + ".values", wide ? dtype::f64 : dtype::f32, {count}});
            specs.push_back({name + ".shape", dtype::i64, {static_cast<std::int64_t>(shape.size())}});
            if (detail::stored_as_bitmask(kept, size)) {
                specs.push_back({name + ".bitmask", dtype::u8, {static_cast<std::int64_t>(size / 8 + (size % 8 != 0))}});
            }
            else {
                specs.push_back({name + ".indices", size > std::uint64_t{std::numeric_limits<std::int32_t>::max()} ? dtype::i64 : dtype::i32, {count}});
            }
            places_.push_back(specs.back().dtype);
        }
        file_ = std::make_unique<safetensors_writer>(path_, specs, metadata_, mode_);
        for (std::size_t i = 0; i < parts_.size(); ++i) { file_->write(3 * i + 1, 0, parts_[i].shape.data(), specs[3 * i + 1].bytes()); }
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to, const std::uint64_t* indices, const float* values,
        std::size_t n) override
    {
        store(tensor, first, from, to, indices, values, n);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to, const std::uint64_t* indices, const double* values,
        std::size_t n) override
    {
        store(tensor, first, from, to, indices, values, n);
    }
    /// Forces the file to disk, so that commit() only renames.
    void finish() { file().finish(); }
    /// Gives the file its name.
    void commit() { file().commit(); }
    [[nodiscard]] const std::filesystem::path& target() const noexcept { return path_; }
    /// What begin() was told.
    [[nodiscard]] const std::vector<part>& parts() const noexcept { return parts_; }
    [[nodiscard]] std::uint64_t kept() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& part : parts_) { total += part.kept; }
        return total;
    }
    /// The name that the file has until commit(); empty before begin().
    [[nodiscard]] std::filesystem::path temporary() const { return file_ ? file_->temporary() : std::filesystem::path(); }
    [[nodiscard]] std::uint64_t file_size() const noexcept { return file_ ? file_->file_size() : 0; }

private:
    safetensors_writer& file()
    {
        if (!file_) { raise<invalid_argument>(message("'", path_.string(), "': no delta was begun")); }
        return *file_;
    }
    template <class A>
    void store(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to, const std::uint64_t* indices, const A* values, std::size_t n)
    {
        if (parts_[tensor].wide != std::same_as<A, double>) {
            raise<invalid_argument>(message("delta of tensor '", parts_[tensor].name, "' was begun with other values"));
        }
        file().write(3 * tensor, first * sizeof(A), values, n * sizeof(A));
        if (places_[tensor] == dtype::u8) {
            std::vector<std::uint8_t> bytes(to / 8 - from / 8 + (to % 8 != 0));
            for (std::size_t i = 0; i < n; ++i) {
                auto& byte = bytes[indices[i] / 8 - from / 8];
                byte = static_cast<std::uint8_t>(byte | (1u << (indices[i] % 8)));
            }
            file_->write(3 * tensor + 2, from / 8, bytes.data(), bytes.size());
        }
        else if (places_[tensor] == dtype::i32) {
            const std::vector<std::int32_t> narrow(indices, indices + n);
            file_->write(3 * tensor + 2, first * sizeof(std::int32_t), narrow.data(), n * sizeof(std::int32_t));
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
    std::unique_ptr<safetensors_writer> file_;
};

/// Writes a delta that lies in memory; see delta_writer for the format.
/// Throws invalid_argument for a sparse vector that breaks its own promises; io_error.
inline void write_delta(const std::filesystem::path& path, const delta& content, durability mode = durability::synchronised)
{
    std::vector<delta_writer::part> parts;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&]<class A>(const sparse_vector<A>& sparse) {
                check(sparse, name);
                parts.push_back({name, sparse.shape, sparse.kept(), std::same_as<A, double>});
            },
            tensor);
    }
    delta_writer writer(path, content.base_fingerprint, content.metadata, mode);
    writer.begin(std::move(parts));
    std::size_t at = 0;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&](const auto& sparse) { writer.write(at, 0, 0, element_count(sparse.shape, name), sparse.indices.data(), sparse.values.data(), sparse.kept()); },
            tensor);
        ++at;
    }
    writer.commit();
}

namespace detail {

/// Reads the tensors of one parameter of a delta file and checks all that the format promises.
class delta_reader {
public:
    delta_reader(const safetensors_file& file)
        : file_(file)
        , model_(file.model())
    { }

    [[nodiscard]] sparse_model read() const
    {
        sparse_model result;
        std::size_t used = 0;
        for (const auto& [label, tensor] : model_) {
            if (!label.ends_with(".shape")) { continue; }
            const auto stem = label.substr(0, label.size() - 6);
            const auto* values = model_.find(stem + ".values");
            if (!values) { fail(stem, message("has '", label, "' and no '", stem, ".values'")); }
            if (values->dtype == dtype::f32) { result.emplace(stem, read_tensor<float>(stem, tensor, *values)); }
            else if (values->dtype == dtype::f64) {
                result.emplace(stem, read_tensor<double>(stem, tensor, *values));
            }
            else {
                fail(stem, message("has values of dtype ", name(values->dtype), "; expected F32 or F64"));
            }
            used += 3;
        }
        if (used != model_.size()) {
            for (const auto& [label, tensor] : model_) {
                const auto dot = label.rfind('.');
                const auto role = dot == label.npos ? std::string() : label.substr(dot);
                const bool known = role == ".shape" || role == ".values" || role == ".indices" || role == ".bitmask";
                if (!known || !result.contains(label.substr(0, dot))) {
                    raise<format_error>(
                        message("holds '", label, "', which belongs to no delta tensor (there must be P.values, P.shape, and P.indices or P.bitmask)"),
                        file_.path().string());
                }
            }
            raise<format_error>("holds tensors that belong to no delta", file_.path().string());
        }
        return result;
    }

private:
    [[noreturn]] void fail(std::string_view stem, const std::string& what) const
    {
        raise<format_error>(message("delta of tensor '", stem, "' ", what), file_.path().string());
    }

    template <class A>
    [[nodiscard]] sparse_vector<A> read_tensor(const std::string& stem, const const_tensor_ref& shape, const const_tensor_ref& values) const
    {
        sparse_vector<A> result;
        if (shape.dtype != dtype::i64 || shape.shape.size() != 1) {
            fail(stem, message("has a shape of dtype ", name(shape.dtype), " and rank ", shape.shape.size(), "; expected I64 of rank 1"));
        }
        result.shape.resize(shape.size());
        std::uint64_t size = 1;
        bool empty = false;
        for (std::size_t i = 0; i < result.shape.size(); ++i) {
            const auto extent = load<std::int64_t>(shape.data, i);
            if (extent < 0) { fail(stem, message("has the negative extent ", extent)); }
            result.shape[i] = extent;
            empty = empty || extent == 0;
        }
        for (const auto extent : result.shape) {
            if (empty) { size = 0; }
            else if (__builtin_mul_overflow(size, static_cast<std::uint64_t>(extent), &size)
                || size > std::uint64_t{std::numeric_limits<std::int64_t>::max()}) {
                fail(stem, "has a shape of more than 2^63-1 elements");
            }
        }
        if (values.shape.size() != 1) { fail(stem, message("has values of rank ", values.shape.size(), "; expected 1")); }
        const std::size_t kept = values.size();
        result.values.resize(kept);
        if (kept) { std::memcpy(result.values.data(), values.data, kept * sizeof(A)); }

        const auto* indices = model_.find(stem + ".indices");
        const auto* bitmask = model_.find(stem + ".bitmask");
        if (!indices == !bitmask) { fail(stem, indices ? "has both indices and a bitmask" : "has neither indices nor a bitmask"); }
        if (indices) { read_indices(stem, *indices, size, kept, result.indices); }
        else {
            read_bitmask(stem, *bitmask, size, kept, result.indices);
        }
        return result;
    }

    void read_indices(const std::string& stem, const const_tensor_ref& tensor, std::uint64_t size, std::size_t kept, std::vector<std::uint64_t>& result) const
    {
        if ((tensor.dtype != dtype::i32 && tensor.dtype != dtype::i64) || tensor.shape.size() != 1) {
            fail(stem, message("has indices of dtype ", name(tensor.dtype), " and rank ", tensor.shape.size(), "; expected I32 or I64 of rank 1"));
        }
        if (tensor.size() != kept) { fail(stem, message("has ", tensor.size(), " indices for ", kept, " values")); }
        result.resize(kept);
        std::int64_t previous = -1;
        for (std::size_t i = 0; i < kept; ++i) {
            const std::int64_t index = tensor.dtype == dtype::i32 ? load<std::int32_t>(tensor.data, i) : load<std::int64_t>(tensor.data, i);
            if (index < 0 || static_cast<std::uint64_t>(index) >= size) {
                fail(stem, message("has index ", index, " at position ", i, "; the tensor has ", size, " elements"));
            }
            if (index <= previous) { fail(stem, message("has index ", index, " after ", previous, " at position ", i, "; indices must ascend")); }
            result[i] = static_cast<std::uint64_t>(previous = index);
        }
    }

    void read_bitmask(const std::string& stem, const const_tensor_ref& tensor, std::uint64_t size, std::size_t kept, std::vector<std::uint64_t>& result) const
    {
        if (tensor.dtype != dtype::u8 || tensor.shape.size() != 1) {
            fail(stem, message("has a bitmask of dtype ", name(tensor.dtype), " and rank ", tensor.shape.size(), "; expected U8 of rank 1"));
        }
        const std::size_t bytes = tensor.size();
        if (bytes != size / 8 + (size % 8 != 0)) {
            fail(stem, message("has a bitmask of ", bytes, " bytes; ", size, " elements need ", size / 8 + (size % 8 != 0)));
        }
        const auto* mask = static_cast<const std::uint8_t*>(tensor.data);
        std::uint64_t set = 0;
        for (std::size_t i = 0; i < bytes; ++i) { set += static_cast<unsigned>(std::popcount(mask[i])); }
        if (set != kept) { fail(stem, message("has ", set, " bits set for ", kept, " values")); }
        if (size % 8 && (mask[bytes - 1] >> (size % 8)) != 0) { fail(stem, "has bits set beyond its last element"); }
        result.reserve(kept);
        for (std::size_t i = 0; i < bytes; ++i) {
            for (unsigned rest = mask[i]; rest; rest &= rest - 1) { result.push_back(8 * std::uint64_t{i} + static_cast<unsigned>(std::countr_zero(rest))); }
        }
    }

    const safetensors_file& file_;
    const_model_ref model_;
};

} // namespace detail

/// Reads a delta and checks all that its format promises: schema, dtypes, counts that match, indices in range and
/// ascending, zero bits beyond the last entry, no tensor left over. See delta_writer for the format.
/// Throws format_error naming the file and the tensor; io_error.
[[nodiscard]] inline delta read_delta(const std::filesystem::path& path)
{
    const safetensors_file file(path);
    const auto fail = [&](const std::string& what) { raise<format_error>(what, path.string()); };
    const auto value = [&](const char* key) {
        const auto place = file.metadata().find(key);
        return place == file.metadata().end() ? std::string() : place->second;
    };
    if (const auto schema = value("schema"); schema != delta_schema) {
        fail(schema.empty() ? message("is not a delta: its metadata has no schema '", delta_schema, "'")
                            : message("has schema '", schema, "'; this version reads '", delta_schema, "'"));
    }
    if (const auto additive = value("additive"); additive != "true") { fail(message("has additive '", additive, "'; this version reads 'true'")); }
    const auto stamp = parse_fingerprint(value("fingerprint"));
    if (!stamp) { fail(message("has the fingerprint '", value("fingerprint"), "'; expected 'xxh64:' and 16 hexadecimal digits")); }
    delta result;
    result.base_fingerprint = *stamp;
    result.metadata = file.metadata();
    result.tensors = detail::delta_reader(file).read();
    return result;
}

/// Throws invalid_argument unless `base` is the model that the delta was made for, or one with the same tensors.
/// Cost: one read of the base's bytes.
inline void check_base(
    const cpu& policy, const delta& content, const const_model_ref& base, std::string_view delta_name = "delta", std::string_view base_name = "base")
{
    if (const auto found = fingerprint(policy, base); found != content.base_fingerprint) {
        raise<invalid_argument>(message("'", base_name, "' is not the model that '", delta_name, "' was made for: its fingerprint is ", fingerprint_text(found),
            "; expected ", fingerprint_text(content.base_fingerprint)));
    }
}

} // namespace taskvec::inline TASKVEC_ABI
