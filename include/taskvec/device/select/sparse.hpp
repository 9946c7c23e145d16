// Sparse vectors in device memory: added to live weights there, and taken back.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/device_models.hpp>
#include <taskvec/select/sparse.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// sparse_vector in device memory: `indices` ascend, are in range, and values[i] belongs to indices[i]. post_pruning()
/// and to_device() make such; nothing checks them again. Move-only; memory is given back in the order of the stream it
/// was made on.
template <arithmetic_element A>
struct device_sparse_vector {
    using value_type = A;
    extents shape{}; ///< of the tensor
    device::buffer<std::uint64_t> indices{}; ///< ascending, row-major flat
    device::buffer<A> values{}; ///< one for each index

    /// How many entries are kept.
    [[nodiscard]] std::size_t kept() const noexcept { return indices.size(); }
};

/// One tensor's kept entries, and a model's by tensor name.
using device_sparse_tensor = std::variant<device_sparse_vector<float>, device_sparse_vector<double>>;
/// A model's kept entries by tensor name, in device memory.
using device_sparse_model = std::map<std::string, device_sparse_tensor>;

/// Entries kept in a whole model.
[[nodiscard]] inline std::uint64_t kept_entries(const device_sparse_model& model)
{
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) {
        total += std::visit([](const auto& sparse) { return sparse.kept(); }, tensor);
    }
    return total;
}

/// A copy in device memory. Errors: as check_sparse().
template <arithmetic_element A>
[[nodiscard]] device_sparse_vector<A> to_device(
    const gpu& policy, const sparse_vector<A>& sparse, std::string_view name = "values")
{
    check_sparse(sparse, name);
    const std::vector<std::uint64_t> indices(sparse.indices.begin(), sparse.indices.end());
    const std::vector<A> values(sparse.values.begin(), sparse.values.end());
    return {sparse.shape, device::buffer<std::uint64_t>(policy, indices), device::buffer<A>(policy, values)};
}
[[nodiscard]] inline device_sparse_model to_device(const gpu& policy, const sparse_model& model)
{
    device_sparse_model result;
    for (const auto& entry : model) {
        std::visit([&](const auto& sparse) { result.emplace(entry.first, to_device(policy, sparse, entry.first)); },
            entry.second);
    }
    return result;
}

/// A copy on the host. Waits.
template <arithmetic_element A>
[[nodiscard]] sparse_vector<A> to_host(const device_sparse_vector<A>& sparse)
{
    const std::vector<std::uint64_t> indices = sparse.indices.download();
    const std::vector<A> values = sparse.values.download();
    sparse_vector<A> result{sparse.shape, index_list(indices.size(), element_count(sparse.shape)),
        std::pmr::vector<A>(values.begin(), values.end())};
    result.indices.store(0, indices.data(), indices.size());
    return result;
}
[[nodiscard]] inline sparse_model to_host(const device_sparse_model& model)
{
    sparse_model result;
    for (const auto& entry : model) {
        std::visit([&](const auto& sparse) { result.emplace(entry.first, to_host(sparse)); }, entry.second);
    }
    return result;
}

namespace elementwise {

TASKVEC_KERNELS_BEGIN

/// live[indices[i]] += scale·values[i], rounded once; what was there goes to saved[i].
template <storage_element T, arithmetic_element A>
struct add_entries {
    const std::uint64_t* indices_;
    const A* values;
    A scale;
    storage_word<T>*live, *saved;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            storage_word<T>& word = live[indices_[i]];
            saved[i] = word;
            word = narrow_word<T>(sum(widen_word<A, T>(word), product(scale, values[i])));
        }
    }
};

/// live[indices[i]] = saved[i]
template <class Word>
struct put_back {
    const std::uint64_t* indices_;
    const Word* saved;
    Word* live;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t i = at.first; i < at.last; i += at.step) { live[indices_[i]] = saved[i]; }
    }
};

TASKVEC_KERNELS_END

} // namespace elementwise

namespace detail {
template <arithmetic_element A>
void check_fits(const device_sparse_vector<A>& sparse, std::size_t size, std::string_view name)
{
    if (element_count(sparse.shape, name) != size) {
        raise<shape_mismatch>(error_code::delta_shape,
            message("tensor '", name, "' has ", size, " elements; the delta is for shape ", to_string(sparse.shape)));
    }
}

/// Calls use(name, sparse, live view of its storage type) for each tensor of a delta, after checking them all. The
/// entries themselves are not read back to be checked.
template <class Use>
void for_each_live(const device_sparse_model& delta, const model_ref& live, Use&& use)
{
    const auto visit_pair = [&](const std::string& name, const auto& tensor, auto&& then) {
        const tensor_ref* const weights = live.find(name);
        if (!weights) {
            raise<invalid_argument>(
                error_code::tensor_missing, message("tensor '", name, "' of the delta is missing in the model"));
        }
        visit_storage(weights->dtype, name, [&]<class T>(std::type_identity<T>) {
            std::visit(
                [&]<class A>(const device_sparse_vector<A>& sparse) {
                    if constexpr (std::same_as<arithmetic_type<T>, A>) {
                        (void)flat_view<T, memory_space::device>(*weights, name);
                        if (sparse.shape != weights->shape) {
                            raise<shape_mismatch>(error_code::delta_shape,
                                message("tensor '", name, "' has shape ", to_string(weights->shape),
                                    "; the delta is for shape ", to_string(sparse.shape)));
                        }
                        then(sparse, device_view<T>{static_cast<T*>(weights->data), weights->size(name)});
                    }
                    else {
                        raise<dtype_mismatch>(error_code::delta_dtype,
                            message("tensor '", name, "' has dtype ", to_string(weights->dtype), "; the delta holds ",
                                to_string(dtype_of<A>), " values"));
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

/// Adds a sparse vector to live weights in place, as on the CPU; returns the words that were there, in device memory.
/// Queued.
///
///     auto saved = apply(policy, delta, weights.view());   // switch the task on
///     undo(policy, delta, saved, weights.view());          // and off: the very words of before
template <arithmetic_element A, output_of<gpu> Live>
auto apply(const gpu& policy, const device_sparse_vector<A>& sparse, Live&& live, double scale = 1.0)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(std::same_as<arithmetic_type<T>, A>,
        "an f64 delta belongs to f64 weights, an f32 delta to f32, bf16 or f16 weights");
    detail::check_fits(sparse, weights.size(), "values");
    device::buffer<T> saved(policy, sparse.kept());
    device::sweep(policy, sparse.kept(),
        elementwise::add_entries<T, A>{sparse.indices.data(), sparse.values.data(), static_cast<A>(scale),
            kernels::words(weights.data()), kernels::words(saved.data())});
    return saved;
}

/// Puts back the words that apply() saved. Bit-exact. Queued.
template <arithmetic_element A, storage_element T, output_of<gpu> Live>
void undo(const gpu& policy, const device_sparse_vector<A>& sparse, const device::buffer<T>& saved, Live&& live)
{
    const auto weights = as_view(live);
    static_assert(std::same_as<element_of<Live>, T>, "the saved words are of another storage type than the weights");
    detail::check_fits(sparse, weights.size(), "values");
    if (saved.size() != sparse.kept()) {
        raise<invalid_argument>(
            error_code::saved_words, message(saved.size(), " saved words for ", sparse.kept(), " entries"));
    }
    const T* const words = saved.data();
    device::sweep(policy, saved.size(),
        elementwise::put_back<storage_word<T>>{
            sparse.indices.data(), kernels::words(words), kernels::words(weights.data())});
}

/// The words that a model-wide apply() replaced, by tensor name.
using device_saved_words = std::map<std::string, device::buffer<std::byte>>;

/// Adds a delta to the live weights of a model in device memory, in place; the result is what undo() needs. Errors: a
/// tensor that is missing, of another shape, storage type or memory; nothing is changed then.
[[nodiscard]] inline device_saved_words apply(
    const gpu& policy, const device_sparse_model& delta, const model_ref& live, double scale = 1.0)
{
    device_saved_words saved;
    detail::for_each_live(delta, live,
        [&]<class A, class T>(const std::string& name, const device_sparse_vector<A>& sparse, device_view<T> weights) {
            device::buffer<std::byte> words(policy, sparse.kept() * sizeof(T));
            device::sweep(policy, sparse.kept(),
                elementwise::add_entries<T, A>{sparse.indices.data(), sparse.values.data(), static_cast<A>(scale),
                    kernels::words(weights.data()), reinterpret_cast<storage_word<T>*>(words.data())});
            saved.emplace(name, std::move(words));
        });
    return saved;
}

/// Takes a delta that apply() added out of the live weights again: the very words of before.
inline void undo(
    const gpu& policy, const device_sparse_model& delta, const device_saved_words& saved, const model_ref& live)
{
    detail::for_each_live(delta, live,
        [&]<class A, class T>(const std::string& name, const device_sparse_vector<A>& sparse, device_view<T> weights) {
            const auto words = saved.find(name);
            if (words == saved.end() || words->second.size() != sparse.kept() * sizeof(T)) {
                raise<invalid_argument>(error_code::saved_words,
                    message("the saved words of tensor '", name, "' do not belong to this delta"));
            }
            device::sweep(policy, sparse.kept(),
                elementwise::put_back<storage_word<T>>{sparse.indices.data(),
                    reinterpret_cast<const storage_word<T>*>(words->second.data()), kernels::words(weights.data())});
        });
}

} // namespace taskvec::inline TASKVEC_ABI
