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
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The value of the metadata key `schema` that this version writes and reads.
inline constexpr std::string_view delta_schema = "taskvec.delta.1";

/// One tensor's kept entries: f32, or f64 where the tensor is f64.
using delta_tensor = std::variant<sparse_vector<float>, sparse_vector<double>>;

/// A model's kept entries by tensor name, with the fingerprint of the base that they are to be added to.
struct delta {
    std::map<std::string, delta_tensor> tensors;
    std::uint64_t base_fingerprint = 0;
    metadata_map metadata{}; ///< further keys to write; on reading, all keys of the file

    [[nodiscard]] std::uint64_t kept() const
    {
        std::uint64_t total = 0;
        for (const auto& [name, tensor] : tensors) {
            total += std::visit([](const auto& sparse) { return sparse.indices.size(); }, tensor);
        }
        return total;
    }
};

namespace detail {

/// True when a bit for each element takes less room than four bytes for each kept one.
[[nodiscard]] constexpr bool stored_as_bitmask(std::uint64_t kept, std::uint64_t size) noexcept
{
    return kept > size / 32;
}

/// Throws unless a sparse vector keeps its own promises: as many values as indices, ascending, in range.
template <class A>
void check_sparse(const sparse_vector<A>& sparse, std::string_view name)
{
    const std::uint64_t size = element_count(sparse.shape, name);
    if (sparse.values.size() != sparse.indices.size()) {
        raise<invalid_argument>(message("delta of tensor '", name, "' has ", sparse.values.size(), " values for ", sparse.indices.size(), " indices"));
    }
    for (std::size_t i = 0; i < sparse.indices.size(); ++i) {
        if (sparse.indices[i] >= size) {
            raise<invalid_argument>(message("delta of tensor '", name, "' has index ", sparse.indices[i], "; the tensor has ", size, " elements"));
        }
        if (i && sparse.indices[i] <= sparse.indices[i - 1]) {
            raise<invalid_argument>(message("delta of tensor '", name, "' has indices that do not ascend at position ", i));
        }
    }
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

/// Writes a delta. For each tensor P: `P.values` (F32, or F64), `P.shape` (I64), and the places of the values as
/// `P.indices` (I32; I64 for tensors of more than 2^31 - 1 elements; ascending, row-major flat) or, where more than 1/32 of the entries
/// are kept, `P.bitmask` (U8, ceil(size / 8) bytes, bit i%8 of byte i/8, least significant first, is set where entry i is
/// kept; the bits beyond the last entry are 0). Metadata: `schema` "taskvec.delta.1", `additive` "true", `fingerprint` of the base
/// (see fingerprint(), "xxh64:" and 16 hexadecimal digits).
/// Throws invalid_argument for a sparse vector that breaks its own promises; io_error. Written atomically.
inline void write_delta(const std::filesystem::path& path, const delta& content, durability mode = durability::synchronised)
{
    std::vector<tensor_spec> specs;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&]<class A>(const sparse_vector<A>& sparse) {
                detail::check_sparse(sparse, name);
                const std::uint64_t size = element_count(sparse.shape, name);
                const auto kept = static_cast<std::int64_t>(sparse.indices.size());
                specs.push_back({name + ".values", dtype_of<A>, {kept}});
                specs.push_back({name + ".shape", dtype::i64, {static_cast<std::int64_t>(sparse.shape.size())}});
                if (detail::stored_as_bitmask(sparse.indices.size(), size)) {
                    specs.push_back({name + ".bitmask", dtype::u8, {static_cast<std::int64_t>((size + 7) / 8)}});
                }
                else {
                    specs.push_back({name + ".indices", size > std::uint64_t{std::numeric_limits<std::int32_t>::max()} ? dtype::i64 : dtype::i32, {kept}});
                }
            },
            tensor);
    }
    metadata_map metadata = content.metadata;
    metadata["schema"] = delta_schema;
    metadata["additive"] = "true";
    metadata["fingerprint"] = fingerprint_text(content.base_fingerprint);
    safetensors_writer writer(path, specs, std::move(metadata), mode);
    std::size_t at = 0;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&]<class A>(const sparse_vector<A>& sparse) {
                writer.write(at, 0, sparse.values.data(), specs[at].bytes());
                writer.write(at + 1, 0, sparse.shape.data(), specs[at + 1].bytes());
                const auto& places = specs[at + 2];
                if (places.dtype == dtype::u8) {
                    std::vector<std::uint8_t> bytes(places.bytes());
                    for (const auto index : sparse.indices) { bytes[index / 8] = static_cast<std::uint8_t>(bytes[index / 8] | (1u << (index % 8))); }
                    writer.write(at + 2, 0, bytes.data(), bytes.size());
                }
                else if (places.dtype == dtype::i32) {
                    const std::vector<std::int32_t> narrow(sparse.indices.begin(), sparse.indices.end());
                    writer.write(at + 2, 0, narrow.data(), places.bytes());
                }
                else {
                    writer.write(at + 2, 0, sparse.indices.data(), places.bytes());
                }
            },
            tensor);
        at += 3;
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

    [[nodiscard]] std::map<std::string, delta_tensor> read() const
    {
        std::map<std::string, delta_tensor> result;
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
/// ascending, zero bits beyond the last entry, no tensor left over. See write_delta() for the format.
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
