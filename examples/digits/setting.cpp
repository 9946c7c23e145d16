// SPDX-License-Identifier: Apache-2.0
#include "setting.hpp"

#include "train.hpp"

namespace digits {

setting make_setting(const dataset& images, std::uint64_t seed)
{
    const splits parts = split(images, seed);
    return {seed, in_every_domain(parts.train), in_every_domain(parts.validation), in_every_domain(parts.test),
        pre_train(parts.train, seed)};
}

scores evaluate(const encoder& model, const matrix& head, const std::vector<dataset>& data)
{
    scores accuracies{};
    for (std::size_t task = 0; task < tasks; ++task) { accuracies[task] = accuracy(model, head, data[task]); }
    return accuracies;
}

scores evaluate(const std::vector<encoder>& models, const matrix& head, const std::vector<dataset>& data)
{
    scores accuracies{};
    for (std::size_t task = 0; task < tasks; ++task) { accuracies[task] = accuracy(models[task], head, data[task]); }
    return accuracies;
}

} // namespace digits
