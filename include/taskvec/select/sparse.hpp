// Sparse vectors: the entries of a tensor that were kept, by ascending flat index; added to live weights and taken
// back. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/parallel.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The kept entries of a tensor of this shape: `indices` ascend and are row-major flat, values[i] belongs to
/// indices[i]. A is the arithmetic type: f32, or f64 for f64 tensors.
template <arithmetic_element A>
struct sparse_vector {
    using value_type = A;
    extents shape{};
    std::vector<std::uint64_t> indices{};
    std::vector<A> values{};

    [[nodiscard]] std::size_t kept() const noexcept { return indices.size(); }
    friend bool operator==(const sparse_vector&, const sparse_vector&) = default;
};

/// The same entries with a bit for each element of the tensor (least significant first) instead of indices: smaller
/// when more than one element in 32 is kept.
template <arithmetic_element A>
struct bitmask_vector {
    extents shape{};
    std::vector<std::uint8_t> bitmask{};
    std::vector<A> values{};

    [[nodiscard]] std::size_t kept() const noexcept { return values.size(); }
    friend bool operator==(const bitmask_vector&, const bitmask_vector&) = default;
};

/// One tensor's kept entries, and a model's by tensor name.
using sparse_tensor = std::variant<sparse_vector<float>, sparse_vector<double>>;
using sparse_model = std::map<std::string, sparse_tensor>;

/// Entries kept in a whole model.
[[nodiscard]] inline std::uint64_t kept(const sparse_model& model)
{
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) {
        total += std::visit([](const auto& sparse) { return sparse.kept(); }, tensor);
    }
    return total;
}

/// Throws invalid_argument unless a sparse vector keeps its own promises: as many values as indices, ascending, in
/// range.
template <arithmetic_element A>
void check(const sparse_vector<A>& sparse, std::string_view name = "values")
{
    const std::uint64_t size = element_count(sparse.shape, name);
    if (sparse.values.size() != sparse.indices.size()) {
        raise<invalid_argument>(message("delta of tensor '", name, "' has ", sparse.values.size(), " values for ",
            sparse.indices.size(), " indices"));
    }
    for (std::size_t i = 0; i < sparse.indices.size(); ++i) {
        if (sparse.indices[i] >= size) {
            raise<invalid_argument>(message(
                "delta of tensor '", name, "' has index ", sparse.indices[i], "; the tensor has ", size, " elements"));
        }
        if (i && sparse.indices[i] <= sparse.indices[i - 1]) {
            raise<invalid_argument>(message("delta of tensor '", name, "' has index ", sparse.indices[i], " after ",
                sparse.indices[i - 1], "; indices must ascend"));
        }
    }
}

/// Indices become bits. Errors: as check().
template <arithmetic_element A>
[[nodiscard]] bitmask_vector<A> to_bitmask(const sparse_vector<A>& sparse)
{
    check(sparse);
    bitmask_vector<A> result{
        sparse.shape, std::vector<std::uint8_t>((element_count(sparse.shape) + 7) / 8, 0), sparse.values};
    for (const auto index : sparse.indices) {
        result.bitmask[index / 8] = static_cast<std::uint8_t>(result.bitmask[index / 8] | (1u << (index % 8)));
    }
    return result;
}

/// Bits become indices. Errors: invalid_argument when the lengths disagree or a bit beyond the last element is set.
template <arithmetic_element A>
[[nodiscard]] sparse_vector<A> to_sparse(const bitmask_vector<A>& masked)
{
    const std::size_t size = element_count(masked.shape);
    if (masked.bitmask.size() != (size + 7) / 8) {
        raise<invalid_argument>(message(
            "a bitmask of ", masked.bitmask.size(), " bytes for ", size, " elements; expected ", (size + 7) / 8));
    }
    sparse_vector<A> result{masked.shape, {}, masked.values};
    result.indices.reserve(masked.values.size());
    for (std::size_t byte = 0; byte < masked.bitmask.size(); ++byte) {
        for (unsigned bits = masked.bitmask[byte]; bits; bits &= bits - 1) {
            result.indices.push_back(byte * 8 + static_cast<unsigned>(std::countr_zero(bits)));
        }
    }
    if (!result.indices.empty() && result.indices.back() >= size) {
        raise<invalid_argument>(message("a bitmask sets bit ", result.indices.back(), " of ", size));
    }
    if (result.indices.size() != result.values.size()) {
        raise<invalid_argument>(
            message("a bitmask sets ", result.indices.size(), " bits for ", result.values.size(), " values"));
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
inline constexpr std::size_t sparse_piece = 65536;

template <arithmetic_element A>
void check_fits(const sparse_vector<A>& sparse, std::size_t size, std::string_view name)
{
    if (element_count(sparse.shape, name) != size) {
        raise<shape_mismatch>(
            message("tensor '", name, "' has ", size, " elements; the delta is for shape ", to_string(sparse.shape)));
    }
}
} // namespace detail

/// Adds a sparse vector to live weights in place: live[index] += scale·value, in f32 (f64 for f64), rounded once.
/// Returns the words that were there, for undo(). Storage type of `live`: any; f64 values need f64 weights.
/// Bit-exact. Errors: invalid_argument (indices), shape_mismatch; nothing is changed then. Cost: O(kept).
///
///     auto saved = apply(cpu{}, delta, weights);   // switch the task on
///     undo(cpu{}, delta, saved, weights);          // and off: the very words of before
template <arithmetic_element A, output_of<cpu> Live>
auto apply(const cpu& policy, const sparse_vector<A>& sparse, Live&& live, double scale = 1.0)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(std::same_as<arithmetic_type<T>, A>,
        "an f64 delta belongs to f64 weights, an f32 delta to f32, bf16 or f16 weights");
    check(sparse);
    detail::check_fits(sparse, weights.size(), "values");
    std::vector<T> saved(sparse.kept());
    const std::size_t pieces = (sparse.kept() + detail::sparse_piece - 1) / detail::sparse_piece;
    for_each_index(policy, pieces, [&](std::size_t piece, std::size_t) {
        const std::size_t begin = piece * detail::sparse_piece,
                          n = std::min(detail::sparse_piece, sparse.kept() - begin);
        for (std::size_t i = begin; i < begin + n; ++i) { saved[i] = weights[sparse.indices[i]]; }
        kernels::add_at<T, A>(kernels::words(weights.data()), sparse.indices.data() + begin,
            sparse.values.data() + begin, static_cast<A>(scale), n);
    });
    return saved;
}

/// Puts back the words that apply() saved. Bit-exact: it restores, it never subtracts.
template <arithmetic_element A, storage_element T, output_of<cpu> Live>
void undo(const cpu& policy, const sparse_vector<A>& sparse, const std::vector<T>& saved, Live&& live)
{
    const auto weights = as_view(live);
    static_assert(std::same_as<element_of<Live>, T>, "the saved words are of another storage type than the weights");
    check(sparse);
    detail::check_fits(sparse, weights.size(), "values");
    if (saved.size() != sparse.kept()) {
        raise<invalid_argument>(message(saved.size(), " saved words for ", sparse.kept(), " entries"));
    }
    const std::size_t pieces = (saved.size() + detail::sparse_piece - 1) / detail::sparse_piece;
    for_each_index(policy, pieces, [&](std::size_t piece, std::size_t) {
        const std::size_t begin = piece * detail::sparse_piece,
                          end = std::min(saved.size(), begin + detail::sparse_piece);
        for (std::size_t i = begin; i < end; ++i) { weights[sparse.indices[i]] = saved[i]; }
    });
}

/// The words that a model-wide apply() replaced, by tensor name.
using saved_words = std::map<std::string, std::vector<std::byte>>;

namespace detail {
/// Calls use(name, sparse, live view of its storage type) for each tensor of a delta, after checking them all. The
/// delta and the live weights are in one memory space; a delta in device memory keeps its own promises (nothing there
/// reads it back).
template <memory_space Space, class Delta, class Use>
void for_each_live(const Delta& delta, const model_ref& live, Use&& use)
{
    const auto visit_pair = [&](const std::string& name, const auto& tensor, auto&& then) {
        const tensor_ref* const weights = live.find(name);
        if (!weights) { raise<invalid_argument>(message("tensor '", name, "' of the delta is missing in the model")); }
        visit_storage(weights->dtype, name, [&]<class T>(std::type_identity<T>) {
            std::visit(
                [&]<class Sparse>(const Sparse& sparse) {
                    using A = typename Sparse::value_type;
                    if constexpr (std::same_as<arithmetic_type<T>, A>) {
                        (void)flat_view<T, Space>(*weights, name);
                        if constexpr (Space == memory_space::host) { check(sparse, name); }
                        if (sparse.shape != weights->shape) {
                            raise<shape_mismatch>(message("tensor '", name, "' has shape ", to_string(weights->shape),
                                "; the delta is for shape ", to_string(sparse.shape)));
                        }
                        then(sparse, view<T, Space>{static_cast<T*>(weights->data), weights->size(name)});
                    }
                    else {
                        raise<dtype_mismatch>(message("tensor '", name, "' has dtype ", taskvec::name(weights->dtype),
                            "; the delta holds ", taskvec::name(dtype_of<A>), " values"));
                    }
                },
                tensor);
        });
    };
    for (const auto& [name, tensor] : delta) {
        visit_pair(name, tensor, [](const auto&, auto) { });
    }
    for (const auto& entry : delta) {
        visit_pair(
            entry.first, entry.second, [&](const auto& sparse, auto weights) { use(entry.first, sparse, weights); });
    }
}
} // namespace detail

/// Adds a delta to the live weights of a model in place; the result is what undo() needs. Errors: a tensor that is
/// missing, of another shape or storage type; nothing is changed then.
template <cpu_policy Policy>
[[nodiscard]] saved_words apply(
    const Policy& policy, const sparse_model& delta, const model_ref& live, double scale = 1.0)
{
    saved_words saved;
    detail::for_each_live<memory_space::host>(
        delta, live, [&](const std::string& name, const auto& sparse, auto weights) {
            const auto words = apply(policy, sparse, weights, scale);
            auto& bytes = saved[name];
            bytes.resize(words.size() * sizeof(words[0]));
            if (!bytes.empty()) { std::memcpy(bytes.data(), words.data(), bytes.size()); }
        });
    return saved;
}

/// Takes a delta that apply() added out of the live weights again: the very words of before.
template <cpu_policy Policy>
void undo(const Policy& policy, const sparse_model& delta, const saved_words& saved, const model_ref& live)
{
    detail::for_each_live<memory_space::host>(
        delta, live, [&]<class T>(const std::string& name, const auto& sparse, host_view<T> weights) {
            const auto bytes = saved.find(name);
            if (bytes == saved.end() || bytes->second.size() != sparse.kept() * sizeof(T)) {
                raise<invalid_argument>(message("the saved words of tensor '", name, "' do not belong to this delta"));
            }
            std::vector<T> words(sparse.kept());
            if (!words.empty()) {
                std::memcpy(static_cast<void*>(words.data()), bytes->second.data(), bytes->second.size());
            }
            undo(policy, sparse, words, weights);
        });
}

/// Receives the kept entries of a model: first how many there are of each included tensor, then the entries, in pieces
/// that come in any order and from several threads at once.
class sparse_sink {
public:
    virtual ~sparse_sink() = default;
    /// kept[i] entries of models.tensors()[i] will follow. Called once, before any write.
    virtual void begin(const aligned_models& models, const std::vector<std::uint64_t>& kept) = 0;
    /// Entries number `first` … `first + n − 1` of a tensor; they all lie in its elements [from, to), where `from` is a
    /// multiple of 64 and `to` too, or the tensor's end. n may be 0.
    virtual void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const float* values, std::size_t n) = 0;
    virtual void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const double* values, std::size_t n) = 0;
};

/// Collects kept entries in memory.
class sparse_model_sink final : public sparse_sink {
public:
    void begin(const aligned_models& models, const std::vector<std::uint64_t>& kept) override
    {
        tensors_.clear();
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            const auto make = [&]<class A>(std::type_identity<A>) {
                sparse_vector<A> sparse{tensor.shape, std::vector<std::uint64_t>(kept[i]), std::vector<A>(kept[i])};
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
    [[nodiscard]] sparse_model take() { return std::move(model_); }

private:
    template <arithmetic_element A>
    void store(std::size_t tensor, std::uint64_t first, const std::uint64_t* indices, const A* values, std::size_t n)
    {
        auto& sparse = std::get<sparse_vector<A>>(*tensors_[tensor]);
        std::copy_n(indices, n, sparse.indices.begin() + static_cast<std::ptrdiff_t>(first));
        std::copy_n(values, n, sparse.values.begin() + static_cast<std::ptrdiff_t>(first));
    }
    sparse_model model_;
    std::vector<sparse_tensor*> tensors_;
};

} // namespace taskvec::inline TASKVEC_ABI
