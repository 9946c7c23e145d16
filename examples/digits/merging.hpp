// taskvec's merges over the models of the digits example: encoders, or adapters, which merge in φ space the same way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "network.hpp"

#include <taskvec/methods/merge.hpp>
#include <taskvec/reuse/parameter_count.hpp>
#include <taskvec/reuse/peru_fft.hpp>
#include <taskvec/reuse/post_pruning.hpp>

#include <algorithm>
#include <cstddef>
#include <utility>
#include <variant>
#include <vector>

namespace digits {

/// The models as the library sees them: named tensors, no copies.
template <class Model>
std::vector<taskvec::const_model_ref> views(const std::vector<Model>& models)
{
    std::vector<taskvec::const_model_ref> all;
    for (const auto& model : models) { all.push_back(model.model()); }
    return all;
}

/// θ* by any method of the library: merged(taskvec::ties_options{.density = 0.2}, base, models). One thread.
template <class Model, taskvec::merge_method Method>
Model merged(const Method& method, const Model& base, const std::vector<Model>& models)
{
    Model result;
    taskvec::merge(taskvec::cpu{.threads = 1}, method, std::as_const(base).model(), views(models), result.model());
    return result;
}

/// θ* beside which tasks keep sparse deltas: θ0 for Post-Pruning, a merged model for PERU-FFT.
struct reused {
    encoder shared;
    std::vector<taskvec::sparse_model> deltas; ///< one for each task

    /// |θ*| + Σ kept.
    [[nodiscard]] std::size_t parameters() const { return taskvec::parameter_count(shared.model(), deltas); }
    /// The same in files, without their headers: four bytes a value, and a tensor's places as indices of four bytes or
    /// as a bit for each of its elements, whichever delta files take.
    [[nodiscard]] std::size_t bytes() const
    {
        std::size_t all = 4 * parameters();
        for (const auto& task : deltas) {
            for (const auto& [name, tensor] : task) {
                const auto [kept, size] = std::visit(
                    [](const auto& sparse) { return std::pair(sparse.kept(), taskvec::element_count(sparse.shape)); },
                    tensor);
                all += std::min(4 * kept, (size + 7) / 8);
            }
        }
        return all;
    }
};

/// θ0 + the top `density` of each task vector.
inline reused post_pruned(const encoder& base, const std::vector<encoder>& models, double density)
{
    reused result{base, {}};
    for (const auto& model : models) {
        result.deltas.push_back(
            taskvec::post_pruning(taskvec::cpu{.threads = 1}, {.density = density}, base.model(), model.model()));
    }
    return result;
}

/// θ* by any method + the top `density` of each residual θt − θ*.
template <taskvec::merge_method Method>
reused peru(const Method& method, const encoder& base, const std::vector<encoder>& models, double density)
{
    reused result;
    result.deltas = taskvec::peru_fft(
        taskvec::cpu{.threads = 1}, method, {.density = density}, base.model(), views(models), result.shared.model());
    return result;
}

} // namespace digits
