// Sparse vectors: the entries of a tensor that were kept, by ascending flat index; added to live weights and taken
// back.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/kernels.hpp>
#include <taskvec/core/parallel.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/select/index_list.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory_resource>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The kept entries of a tensor of this shape: `indices` ascend and are row-major flat, values[i] belongs to
/// indices[i]. A is the arithmetic type: f32, or f64 for f64 tensors. An f32 entry takes 8 bytes (12 in tensors of more
/// than 2^32 elements).
template <arithmetic_element A>
struct sparse_vector {
    using value_type = A;
    extents shape{}; ///< of the tensor
    index_list indices{}; ///< ascending, row-major flat
    std::pmr::vector<A> values{}; ///< one for each index

    /// How many entries are kept.
    [[nodiscard]] std::size_t kept() const noexcept { return indices.size(); }
    friend bool operator==(const sparse_vector&, const sparse_vector&) = default;
};

/// The same entries with a bit for each element of the tensor (least significant first) instead of indices: smaller
/// when more than one element in 32 is kept.
template <arithmetic_element A>
struct bitmask_vector {
    using value_type = A;
    extents shape{}; ///< of the tensor
    std::pmr::vector<std::uint8_t> bitmask{}; ///< bit i%8 of byte i/8 is entry i
    std::pmr::vector<A> values{}; ///< of the bits that are set, in order

    /// How many entries are kept.
    [[nodiscard]] std::size_t kept() const noexcept { return values.size(); }
    friend bool operator==(const bitmask_vector&, const bitmask_vector&) = default;
};

/// One tensor's kept entries, and a model's by tensor name.
using sparse_tensor = std::variant<sparse_vector<float>, sparse_vector<double>>;
/// A model's kept entries by tensor name.
using sparse_model = std::map<std::string, sparse_tensor>;

/// Entries kept in a whole model.
[[nodiscard]] inline std::uint64_t kept_entries(const sparse_model& model)
{
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) {
        total += std::visit([](const auto& sparse) { return sparse.kept(); }, tensor);
    }
    return total;
}

namespace detail {
/// A value of T from memory of any alignment.
template <class T>
[[nodiscard]] T load(const void* data, std::size_t index) noexcept
{
    T value;
    std::memcpy(&value, static_cast<const std::byte*>(data) + index * sizeof(T), sizeof(T));
    return value;
}
} // namespace detail

/// Kept entries that lie in somebody else's memory, such as a mapped file: indices or a bitmask, and their values, of
/// any alignment. Who makes one has checked them: indices ascend and are in range, the bits are as many as the values.
struct sparse_view {
    std::string name = "values"; ///< of the tensor
    extents shape{}; ///< of the tensor
    std::uint64_t size = 0, kept = 0; ///< elements, and entries
    bool wide = false; ///< f64 values
    const std::byte* values = nullptr; ///< f32, or f64 where `wide`
    const std::byte* indices = nullptr; ///< 32-bit words, or 64-bit ones; null where there is a bitmask
    bool wide_indices = false; ///< indices are 64-bit words
    const std::uint8_t* bitmask = nullptr; ///< where there are no indices: bit i%8 of byte i/8 is entry i
    std::span<const std::uint64_t> before{}; ///< bits set before each run of `run` elements
    static constexpr std::uint64_t run = 65536; ///< elements of a run that `before` counts

    /// The flat index of kept entry number `entry`; where there are indices.
    [[nodiscard]] std::uint64_t index(std::uint64_t entry) const noexcept
    {
        return wide_indices ? detail::load<std::uint64_t>(indices, entry) : detail::load<std::uint32_t>(indices, entry);
    }
    /// The value of kept entry number `entry`, as an A.
    template <arithmetic_element A>
    [[nodiscard]] A value(std::uint64_t entry) const noexcept
    {
        return wide ? static_cast<A>(detail::load<double>(values, entry))
                    : static_cast<A>(detail::load<float>(values, entry));
    }
    /// Calls use(index, entry) for the kept entries in elements [from, to), in ascending order.
    template <class Use>
    void for_each(std::uint64_t from, std::uint64_t to, Use&& use) const
    {
        if (!bitmask) {
            std::uint64_t low = 0, high = kept; // the first entry at or after `from`
            while (low < high) {
                const std::uint64_t middle = low + (high - low) / 2;
                if (index(middle) < from) { low = middle + 1; }
                else {
                    high = middle;
                }
            }
            for (; low < kept; ++low) {
                const auto place = index(low);
                if (place >= to) { return; }
                use(place, low);
            }
            return;
        }
        if (from >= to) { return; }
        std::uint64_t entry = before[from / run];
        for (std::uint64_t byte = from / run * (run / 8); byte < from / 8; ++byte) {
            entry += static_cast<unsigned>(std::popcount(bitmask[byte]));
        }
        for (std::uint64_t byte = from / 8; byte * 8 < to; ++byte) {
            for (unsigned rest = bitmask[byte]; rest; rest &= rest - 1, ++entry) {
                const std::uint64_t place = 8 * byte + static_cast<unsigned>(std::countr_zero(rest));
                if (place >= from && place < to) { use(place, entry); }
            }
        }
    }
};

/// Throws invalid_argument unless a sparse vector keeps its own promises: as many values as indices, ascending, in
/// range.
template <arithmetic_element A>
void check_sparse(const sparse_vector<A>& sparse, std::string_view name = "values")
{
    const std::uint64_t size = element_count(sparse.shape, name);
    if (sparse.values.size() != sparse.indices.size()) {
        raise<invalid_argument>(error_code::delta_entries,
            message("delta of tensor '", name, "' has ", sparse.values.size(), " values for ", sparse.indices.size(),
                " indices"));
    }
    for (std::size_t i = 0; i < sparse.indices.size(); ++i) {
        if (sparse.indices[i] >= size) {
            raise<invalid_argument>(error_code::delta_entries,
                message("delta of tensor '", name, "' has index ", sparse.indices[i], "; the tensor has ", size,
                    " elements"));
        }
        if (i && sparse.indices[i] <= sparse.indices[i - 1]) {
            raise<invalid_argument>(error_code::delta_entries,
                message("delta of tensor '", name, "' has index ", sparse.indices[i], " after ", sparse.indices[i - 1],
                    "; indices must ascend"));
        }
    }
}
/// Throws invalid_argument unless a bitmask has a bit for each element, none beyond the last, and as many set as there
/// are values.
template <arithmetic_element A>
void check_sparse(const bitmask_vector<A>& masked, std::string_view name = "values")
{
    const std::size_t size = element_count(masked.shape, name), bytes = masked.bitmask.size();
    if (bytes != size / 8 + (size % 8 != 0)) {
        raise<invalid_argument>(error_code::delta_entries,
            message("a bitmask of ", bytes, " bytes for ", size, " elements; expected ", size / 8 + (size % 8 != 0)));
    }
    if (size % 8 && (masked.bitmask[bytes - 1] >> (size % 8)) != 0) {
        raise<invalid_argument>(error_code::delta_entries,
            message("a bitmask sets bit ",
                8 * (bytes - 1) + static_cast<std::size_t>(std::bit_width(unsigned{masked.bitmask[bytes - 1]})) - 1,
                " of ", size));
    }
    std::size_t set = 0;
    for (const std::uint8_t byte : masked.bitmask) { set += static_cast<unsigned>(std::popcount(byte)); }
    if (set != masked.values.size()) {
        raise<invalid_argument>(
            error_code::delta_entries, message("a bitmask sets ", set, " bits for ", masked.values.size(), " values"));
    }
}

/// Indices become bits, in memory from `memory`. Errors: as check_sparse().
template <arithmetic_element A>
[[nodiscard]] bitmask_vector<A> to_bitmask(
    const sparse_vector<A>& sparse, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
{
    check_sparse(sparse);
    const std::size_t size = element_count(sparse.shape);
    bitmask_vector<A> result{sparse.shape, std::pmr::vector<std::uint8_t>(size / 8 + (size % 8 != 0), 0, memory),
        std::pmr::vector<A>(sparse.values, memory)};
    for (const auto index : sparse.indices) {
        result.bitmask[index / 8] = static_cast<std::uint8_t>(result.bitmask[index / 8] | (1u << (index % 8)));
    }
    return result;
}

/// Bits become indices, in memory from `memory`. Errors: as check_sparse().
template <arithmetic_element A>
[[nodiscard]] sparse_vector<A> to_sparse(
    const bitmask_vector<A>& masked, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
{
    check_sparse(masked);
    sparse_vector<A> result{
        masked.shape, index_list(0, element_count(masked.shape), memory), std::pmr::vector<A>(masked.values, memory)};
    result.indices.reserve(masked.values.size());
    for (std::size_t byte = 0; byte < masked.bitmask.size(); ++byte) {
        for (unsigned bits = masked.bitmask[byte]; bits; bits &= bits - 1) {
            result.indices.push_back(byte * 8 + static_cast<unsigned>(std::countr_zero(bits)));
        }
    }
    return result;
}

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// live[indices[i]] += scale · values[i], in A, rounded once on storing.
template <storage_element T, arithmetic_element A>
TASKVEC_NOINLINE void add_at(storage_word<T>* live, const std::uint64_t* TASKVEC_RESTRICT indices,
    const A* TASKVEC_RESTRICT values, A scale, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A product = scale * values[i];
        live[indices[i]] = narrow_word<T>(widen_word<A, T>(live[indices[i]]) + product);
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// The view of a sparse vector, a bitmask or a view, checked, and what it needs beside them.
struct viewed_entries {
    sparse_view view;
    std::pmr::vector<std::uint64_t> before; // what view.before shows, of a bitmask in memory
};
template <arithmetic_element A>
[[nodiscard]] viewed_entries view_entries(
    const sparse_vector<A>& sparse, std::pmr::memory_resource* memory, std::string_view name = "values")
{
    check_sparse(sparse, name);
    viewed_entries result{{.name = std::string(name), .shape = sparse.shape}, std::pmr::vector<std::uint64_t>(memory)};
    result.view.size = element_count(sparse.shape, name);
    result.view.kept = sparse.kept();
    result.view.wide = std::same_as<A, double>;
    result.view.values = reinterpret_cast<const std::byte*>(sparse.values.data());
    result.view.indices = static_cast<const std::byte*>(sparse.indices.data());
    result.view.wide_indices = sparse.indices.wide();
    return result;
}
template <arithmetic_element A>
[[nodiscard]] viewed_entries view_entries(
    const bitmask_vector<A>& masked, std::pmr::memory_resource* memory, std::string_view name = "values")
{
    check_sparse(masked, name);
    viewed_entries result{{.name = std::string(name), .shape = masked.shape}, std::pmr::vector<std::uint64_t>(memory)};
    result.view.size = element_count(masked.shape, name);
    result.view.kept = masked.kept();
    result.view.wide = std::same_as<A, double>;
    result.view.values = reinterpret_cast<const std::byte*>(masked.values.data());
    result.view.bitmask = masked.bitmask.data();
    result.before.reserve(masked.bitmask.size() / (sparse_view::run / 8) + 1);
    std::uint64_t set = 0;
    for (std::size_t byte = 0; byte < masked.bitmask.size(); ++byte) {
        if (byte % (sparse_view::run / 8) == 0) { result.before.push_back(set); }
        set += static_cast<unsigned>(std::popcount(masked.bitmask[byte]));
    }
    result.view.before = result.before;
    return result;
}
[[nodiscard]] inline viewed_entries view_entries(const sparse_view& view, std::pmr::memory_resource* memory)
{
    return {view, std::pmr::vector<std::uint64_t>(memory)};
}

/// Entries of one sort that are handed on together.
inline constexpr std::size_t entry_batch = 512;

/// Calls use(first, places, n) for the entries first … first + n − 1 at these places, n ≤ entry_batch, each entry once:
/// pieces of 65,536 entries (of a bitmask: elements) in parallel.
template <class Use>
void for_each_entry_batch(const cpu& policy, const sparse_view& entries, const Use& use)
{
    const std::uint64_t length = entries.bitmask ? entries.size : entries.kept, piece = sparse_view::run;
    for_each_index(policy, static_cast<std::size_t>((length + piece - 1) / piece), [&](std::size_t p, std::size_t) {
        std::array<std::uint64_t, entry_batch> places;
        std::size_t n = 0;
        std::uint64_t first = entries.bitmask ? entries.before[p] : p * piece;
        const auto take = [&](std::uint64_t place) {
            places[n++] = place;
            if (n == entry_batch) {
                use(first, places.data(), n);
                first += n;
                n = 0;
            }
        };
        const std::uint64_t begin = p * piece, end = std::min(length, begin + piece);
        if (entries.bitmask) {
            entries.for_each(begin, end, [&](std::uint64_t place, std::uint64_t) { take(place); });
        }
        else {
            for (std::uint64_t entry = begin; entry < end; ++entry) { take(entries.index(entry)); }
        }
        if (n > 0) { use(first, places.data(), n); }
    });
}

/// Saves the words at the entries' places, then adds the entries.
template <storage_element T>
void add_entries(const cpu& policy, const sparse_view& entries, T* live, double scale, T* saved)
{
    using A = arithmetic_type<T>;
    for_each_entry_batch(policy, entries, [&](std::uint64_t first, const std::uint64_t* places, std::size_t n) {
        std::array<A, entry_batch> values;
        for (std::size_t i = 0; i < n; ++i) {
            values[i] = entries.value<A>(first + i);
            saved[first + i] = live[places[i]];
        }
        kernels::add_at<T, A>(kernels::words(live), places, values.data(), static_cast<A>(scale), n);
    });
}
template <storage_element T>
void put_entries_back(const cpu& policy, const sparse_view& entries, T* live, const T* saved)
{
    for_each_entry_batch(policy, entries, [&](std::uint64_t first, const std::uint64_t* places, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) { live[places[i]] = saved[first + i]; }
    });
}

/// Throws unless entries fit flat weights of T.
template <storage_element T>
void check_fits(const sparse_view& entries, std::size_t size)
{
    if (entries.wide != std::same_as<arithmetic_type<T>, double>) {
        raise<dtype_mismatch>(error_code::delta_dtype,
            message("tensor '", entries.name, "' has dtype ", to_string(dtype_of<T>), "; the delta holds ",
                entries.wide ? "F64" : "F32", " values"));
    }
    if (entries.size != size) {
        raise<shape_mismatch>(error_code::delta_shape,
            message("tensor '", entries.name, "' has ", size, " elements; the delta is for shape ",
                to_string(entries.shape)));
    }
}

template <class T>
inline constexpr bool holds_entries = false;
template <class A>
inline constexpr bool holds_entries<sparse_vector<A>> = true;
template <class A>
inline constexpr bool holds_entries<bitmask_vector<A>> = true;
template <>
inline constexpr bool holds_entries<sparse_view> = true;

/// What the values are known to be while compiling; void for a view.
template <class Sparse>
struct entry_value {
    using type = void;
};
template <class Sparse>
    requires requires { typename Sparse::value_type; }
struct entry_value<Sparse> {
    using type = typename Sparse::value_type;
};
template <class Sparse, class T>
inline constexpr bool entries_suit = std::same_as<typename entry_value<Sparse>::type, void>
    || std::same_as<typename entry_value<Sparse>::type, arithmetic_type<T>>;

} // namespace detail

/// One tensor's kept entries: a sparse_vector, a bitmask_vector, or a sparse_view.
template <class X>
concept sparse_entries = detail::holds_entries<X>;

/// Adds sparse entries to live weights in place: live[index] += scale·value, in f32 (f64 for f64), rounded once. The
/// words that were there go to `saved`, for undo(): room for kept() words, in the order of the entries. Storage type of
/// `live`: any; f64 values need f64 weights. A bitmask is read as it is. Bit-exact. Errors: invalid_argument (indices,
/// room), shape_mismatch, dtype_mismatch (a view of other values); nothing is changed then. Cost: O(kept), and for a
/// bitmask O(elements / 8). Memory: none, but for a bitmask 8 bytes for each 65,536 elements.
///
///     std::vector<bf16> saved(delta.kept());
///     apply(cpu{}, delta, weights, saved);         // switch the task on
///     undo(cpu{}, delta, saved, weights);          // and off: the very words of before
template <sparse_entries Sparse, output_of<cpu> Live, class Saved>
    requires std::ranges::contiguous_range<Saved> && std::ranges::sized_range<Saved>
void apply(const cpu& policy, const Sparse& sparse, Live&& live, Saved&& saved, double scale = 1.0)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(detail::entries_suit<Sparse, T>,
        "an f64 delta belongs to f64 weights, an f32 delta to f32, bf16 or f16 weights");
    static_assert(std::same_as<std::ranges::range_value_t<Saved>, T>,
        "the saved words are of another storage type than the weights");
    static_assert(std::ranges::borrowed_range<Saved> || std::is_lvalue_reference_v<Saved>,
        "the saved words would be gone before undo(): name a container for them");
    const auto entries = detail::view_entries(sparse, memory_of(policy));
    detail::check_fits<T>(entries.view, weights.size());
    if (std::ranges::size(saved) != entries.view.kept) {
        raise<invalid_argument>(error_code::saved_words,
            message(
                "room for ", std::ranges::size(saved), " saved words; the delta has ", entries.view.kept, " entries"));
    }
    detail::add_entries(policy, entries.view, weights.data(), scale, std::ranges::data(saved));
}

/// The same with the saved words returned, in memory of the policy's resource.
///
///     const auto saved = apply(cpu{}, delta, weights);
template <sparse_entries Sparse, output_of<cpu> Live>
[[nodiscard]] auto apply(const cpu& policy, const Sparse& sparse, Live&& live, double scale = 1.0)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(detail::entries_suit<Sparse, T>,
        "an f64 delta belongs to f64 weights, an f32 delta to f32, bf16 or f16 weights");
    const auto entries = detail::view_entries(sparse, memory_of(policy));
    detail::check_fits<T>(entries.view, weights.size());
    std::pmr::vector<T> saved(entries.view.kept, memory_of(policy));
    detail::add_entries(policy, entries.view, weights.data(), scale, saved.data());
    return saved;
}

/// Puts back the words that apply() saved. Bit-exact: it restores, it never subtracts.
template <sparse_entries Sparse, class Saved, output_of<cpu> Live>
    requires std::ranges::contiguous_range<const Saved> && std::ranges::sized_range<const Saved>
void undo(const cpu& policy, const Sparse& sparse, const Saved& saved, Live&& live)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(std::same_as<std::ranges::range_value_t<const Saved>, T>,
        "the saved words are of another storage type than the weights");
    const auto entries = detail::view_entries(sparse, memory_of(policy));
    detail::check_fits<T>(entries.view, weights.size());
    if (std::ranges::size(saved) != entries.view.kept) {
        raise<invalid_argument>(error_code::saved_words,
            message(std::ranges::size(saved), " saved words for ", entries.view.kept, " entries"));
    }
    detail::put_entries_back(policy, entries.view, weights.data(), std::ranges::data(saved));
}

/// The entries of a model's tensors as views, checked, in name order; they live as long as the model does.
/// Errors: as check_sparse().
[[nodiscard]] inline std::vector<sparse_view> views(const sparse_model& model)
{
    std::vector<sparse_view> result;
    result.reserve(model.size());
    for (const auto& entry : model) {
        result.push_back(std::visit(
            [&](const auto& sparse) {
                return detail::view_entries(sparse, std::pmr::get_default_resource(), entry.first).view;
            },
            entry.second));
    }
    return result;
}
std::vector<sparse_view> views(const sparse_model&& model) = delete; // views of a temporary

namespace detail {

/// Calls use(entries, live weights of their type T, offset of the tensor's saved words) after checking all tensors.
/// Returns the bytes of the saved words: tensor after tensor, each from a multiple of 8 on.
template <class Use>
std::size_t for_each_live_tensor(std::span<const sparse_view> delta, const model_ref& live, const Use& use)
{
    const auto visit_pair = [&](const sparse_view& entries, std::size_t& at, const auto& then) {
        const tensor_ref* const weights = live.find(entries.name);
        if (!weights) {
            raise<invalid_argument>(error_code::tensor_missing,
                message("tensor '", entries.name, "' of the delta is missing in the model"));
        }
        visit_storage(weights->dtype, entries.name, [&]<class T>(std::type_identity<T>) {
            check_fits<T>(entries, entries.size);
            (void)flat_view<T>(*weights, entries.name);
            if (entries.shape != weights->shape) {
                raise<shape_mismatch>(error_code::delta_shape,
                    message("tensor '", entries.name, "' has shape ", to_string(weights->shape),
                        "; the delta is for shape ", to_string(entries.shape)));
            }
            then(entries, static_cast<T*>(weights->data), at);
            at += (entries.kept * sizeof(T) + 7) / 8 * 8;
        });
    };
    std::size_t bytes = 0, at = 0;
    for (const auto& entries : delta) {
        visit_pair(entries, bytes, [](const auto&, auto*, std::size_t) { });
    }
    for (const auto& entries : delta) { visit_pair(entries, at, use); }
    return bytes;
}
inline void check_saved_bytes(std::span<const std::byte> saved, std::size_t needed)
{
    if (saved.size() != needed) {
        raise<invalid_argument>(error_code::saved_words,
            message("the saved words of this delta take ", needed, " bytes (see saved_bytes()), not ", saved.size(),
                ": they do not belong to it"));
    }
    if (reinterpret_cast<std::uintptr_t>(saved.data()) % 8 != 0) {
        raise<invalid_argument>(error_code::tensor_layout, "memory for saved words must be aligned to 8 bytes");
    }
}

} // namespace detail

/// The words that a model-wide apply() replaced.
class saved_words {
public:
    saved_words() = default;
    /// Room for `bytes` bytes (see saved_bytes()), from `memory`.
    explicit saved_words(std::size_t bytes, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : words_((bytes + 7) / 8, memory)
    { }
    /// The memory, aligned to 8 bytes.
    [[nodiscard]] std::span<const std::byte> bytes() const& noexcept { return std::as_bytes(std::span(words_)); }
    /// The memory, aligned to 8 bytes, to be written.
    [[nodiscard]] std::span<std::byte> bytes() & noexcept { return std::as_writable_bytes(std::span(words_)); }
    std::span<const std::byte> bytes() const&& = delete;

private:
    std::pmr::vector<std::uint64_t> words_;
};

/// Bytes that the saved words of a model-wide apply() take: 8 for each 8 begun of each tensor. Errors: as apply().
[[nodiscard]] inline std::size_t saved_bytes(std::span<const sparse_view> delta, const model_ref& live)
{
    return detail::for_each_live_tensor(delta, live, [](const auto&, auto*, std::size_t) { });
}
[[nodiscard]] inline std::size_t saved_bytes(const sparse_model& delta, const model_ref& live)
{
    return saved_bytes(views(delta), live);
}

/// Adds a delta to the live weights of a model in place. The words that were there go to `saved`, for undo():
/// saved_bytes() bytes, aligned to 8. Errors: a tensor that is missing, of another shape or storage type; room of
/// another size; nothing is changed then.
///
///     const delta_file delta("task.delta.safetensors");
///     std::vector<double> memory(saved_bytes(delta.parts(), live) / 8);
///     apply(cpu{}, delta.parts(), live, std::as_writable_bytes(std::span(memory)));
template <cpu_policy Policy>
void apply(const Policy& policy, std::span<const sparse_view> delta, const model_ref& live, std::span<std::byte> saved,
    double scale = 1.0)
{
    detail::check_saved_bytes(saved, saved_bytes(delta, live));
    detail::for_each_live_tensor(delta, live, [&]<class T>(const sparse_view& entries, T* weights, std::size_t offset) {
        detail::add_entries(policy, entries, weights, scale, reinterpret_cast<T*>(saved.data() + offset));
    });
}
template <cpu_policy Policy>
void apply(const Policy& policy, const sparse_model& delta, const model_ref& live, std::span<std::byte> saved,
    double scale = 1.0)
{
    apply(policy, views(delta), live, saved, scale);
}

/// The same with the saved words returned, in memory of the policy's resource.
template <cpu_policy Policy>
[[nodiscard]] saved_words apply(
    const Policy& policy, std::span<const sparse_view> delta, const model_ref& live, double scale = 1.0)
{
    saved_words saved(saved_bytes(delta, live), memory_of(policy));
    apply(policy, delta, live, saved.bytes(), scale);
    return saved;
}
template <cpu_policy Policy>
[[nodiscard]] saved_words apply(
    const Policy& policy, const sparse_model& delta, const model_ref& live, double scale = 1.0)
{
    return apply(policy, views(delta), live, scale);
}

/// Takes a delta that apply() added out of the live weights again: the very words of before.
template <cpu_policy Policy>
void undo(
    const Policy& policy, std::span<const sparse_view> delta, std::span<const std::byte> saved, const model_ref& live)
{
    detail::check_saved_bytes(saved, saved_bytes(delta, live));
    detail::for_each_live_tensor(delta, live, [&]<class T>(const sparse_view& entries, T* weights, std::size_t offset) {
        detail::put_entries_back(policy, entries, weights, reinterpret_cast<const T*>(saved.data() + offset));
    });
}
template <cpu_policy Policy>
void undo(const Policy& policy, const sparse_model& delta, std::span<const std::byte> saved, const model_ref& live)
{
    undo(policy, views(delta), saved, live);
}
template <cpu_policy Policy>
void undo(const Policy& policy, std::span<const sparse_view> delta, const saved_words& saved, const model_ref& live)
{
    undo(policy, delta, saved.bytes(), live);
}
template <cpu_policy Policy>
void undo(const Policy& policy, const sparse_model& delta, const saved_words& saved, const model_ref& live)
{
    undo(policy, views(delta), saved.bytes(), live);
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, apply, sparse_arguments,
    "apply(policy, delta, live), or (policy, delta, live, saved): a sparse vector and a flat view, or a sparse_model "
    "and a "
    "taskvec::model_ref; or apply(policy, base, vector, lambda, output)")
TASKVEC_WRONG_CALLS(cpu, undo, any_arguments,
    "undo(policy, delta, saved, live): a sparse vector and flat views, or a sparse_model, the words that apply() saved "
    "and "
    "a taskvec::model_ref")

/// Receives the kept entries of a model: first how many there are of each included tensor, then the entries, in pieces
/// that come in any order and from several threads at once.
class sparse_sink {
public:
    virtual ~sparse_sink() = default;
    /// kept[i] entries of models.tensors()[i] will follow. Called once, before any write.
    virtual void begin(const aligned_models& models, std::span<const std::uint64_t> kept) = 0;
    /// Entries number `first` … `first + n − 1` of a tensor; they all lie in its elements [from, to), where `from` is a
    /// multiple of 64 and `to` too, or the tensor's end. n may be 0.
    virtual void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const float* values, std::size_t n) = 0;
    virtual void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const double* values, std::size_t n) = 0;
};

/// Collects kept entries in memory, which comes from `memory` and must outlive what take() returns.
class sparse_model_sink final : public sparse_sink {
public:
    /// What is collected lies in `memory`.
    explicit sparse_model_sink(std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : memory_(memory)
    { }
    void begin(const aligned_models& models, std::span<const std::uint64_t> kept) override
    {
        tensors_.clear();
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            const auto make = [&]<class A>(std::type_identity<A>) {
                sparse_vector<A> sparse{
                    tensor.shape, index_list(kept[i], tensor.size, memory_), std::pmr::vector<A>(kept[i], memory_)};
                tensors_.push_back(&model_.insert_or_assign(tensor.name, std::move(sparse)).first->second);
            };
            if (tensor.wide_base()) { make(std::type_identity<double>{}); }
            else {
                make(std::type_identity<float>{});
            }
        }
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t, std::uint64_t, const std::uint64_t* indices,
        const float* values, std::size_t n) override
    {
        store(tensor, first, indices, values, n);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t, std::uint64_t, const std::uint64_t* indices,
        const double* values, std::size_t n) override
    {
        store(tensor, first, indices, values, n);
    }
    /// Hands over what was collected.
    [[nodiscard]] sparse_model take() { return std::move(model_); }

private:
    template <arithmetic_element A>
    void store(std::size_t tensor, std::uint64_t first, const std::uint64_t* indices, const A* values, std::size_t n)
    {
        auto& sparse = std::get<sparse_vector<A>>(*tensors_[tensor]);
        sparse.indices.store(first, indices, n);
        std::copy_n(values, n, sparse.values.begin() + static_cast<std::ptrdiff_t>(first));
    }
    std::pmr::memory_resource* memory_;
    sparse_model model_;
    std::vector<sparse_tensor*> tensors_;
};

} // namespace taskvec::inline TASKVEC_ABI
