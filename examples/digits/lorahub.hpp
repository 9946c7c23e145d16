// LoraHub on the digits: the weights of a combination, sought on a few images of each task without gradients.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "merging.hpp"
#include "setting.hpp"

#include <taskvec/search/lorahub.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace digits {

/// Of each task's validation split. The paper: five examples of one task, and 40 evaluations by Shiwa.
inline constexpr std::size_t few_shot_images = 64, lorahub_evaluations = 200;

/// A (1+1) evolution strategy: the best weights so far plus normal noise, whose size grows by a half after a step that
/// helped and shrinks by a seventh or so after one that did not (the one-fifth rule). An optimiser of lorahub() that
/// needs no library, and whose draws are a function of the seed alone; <taskvec/search/lorahub_nlopt.hpp> has NLopt's
/// COBYLA.
struct evolution_strategy {
    std::uint64_t seed = 0;
    double step = 0.2;
    bool sum_to_one = false; ///< only weights with Σ wt = 1, as the second paper writes its problem (E.1.4)

    void operator()(const taskvec::lorahub_problem& problem, const taskvec::lorahub_objective& objective) const;
};

/// Mean cross-entropy of one model on every task's few images.
class few_shot_loss {
public:
    explicit few_shot_loss(const setting& s);
    [[nodiscard]] double operator()(const encoder& model) const;

private:
    const matrix* head_;
    std::vector<dataset> few_;
};

/// θ0 + Σ wt·(θt − θ0), and what was found.
template <class Model>
struct combination {
    Model model;
    taskvec::lorahub_result found;
};

/// LoraHub over encoders, or over adapters around their common φ0; `encoder_of` makes the encoder that a candidate is
/// scored as.
template <class Model, std::invocable<const Model&> EncoderOf>
combination<Model> lorahub(
    const setting& s, const Model& base, const std::vector<Model>& models, EncoderOf&& encoder_of)
{
    const few_shot_loss loss(s);
    combination<Model> result;
    result.found = taskvec::lorahub(
        taskvec::cpu{.threads = 1}, {.evaluations = lorahub_evaluations}, base.model(), views(models),
        result.model.model(),
        [&](const taskvec::const_model_ref&) { return loss(encoder_of(std::as_const(result.model))); },
        evolution_strategy{.seed = s.seed});
    return result;
}
inline combination<encoder> lorahub(const setting& s, const std::vector<encoder>& models)
{
    return lorahub(s, s.base.body, models, [](const encoder& candidate) -> const encoder& { return candidate; });
}

/// "w 0.04 0.12 …": the weights of the best candidate.
[[nodiscard]] std::string text(const taskvec::lorahub_result& found);

} // namespace digits
