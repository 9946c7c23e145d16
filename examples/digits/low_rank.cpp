// The one file of the example that compiles decompositions.
// SPDX-License-Identifier: Apache-2.0
#include "low_rank.hpp"

#include "checkpoints.hpp"

#include <taskvec/adapters/merge_adapters.hpp>
#include <taskvec/adapters/merge_ties.hpp>
#include <taskvec/formats/peft.hpp>
#include <taskvec/jvp/lora_layer.hpp>
#include <taskvec/linalg/factored_svd.hpp>
#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/reuse/peru_lora.hpp>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

namespace digits {
namespace {

taskvec::matrix_view<float> weight(encoder::map w)
{
    return {w.data(), static_cast<std::size_t>(w.rows()), static_cast<std::size_t>(w.cols()),
        taskvec::matrix_order::row_major};
}

} // namespace

updates updates_of(const adapter& phi)
{
    return {{"fc1", taskvec::make_lora(phi.b1(), phi.a1())}, {"fc2", taskvec::make_lora(phi.b2(), phi.a2())}};
}

encoder folded(const encoder& base, const updates& adapter, double factor)
{
    encoder model = base;
    const std::array<std::pair<const char*, taskvec::matrix_view<float>>, 2> weights{
        {{"fc1", weight(model.weight1())}, {"fc2", weight(model.weight2())}}};
    for (const auto& [module, update] : adapter) {
        const auto place = std::ranges::find(weights, module, &decltype(weights)::value_type::first);
        if (place == weights.end()) {
            taskvec::raise<taskvec::invalid_argument>(
                taskvec::error_code::tensor_missing, taskvec::message("the network has no module '", module, "'"));
        }
        taskvec::fold_update(one_thread, update, place->second, factor, module);
    }
    return model;
}

std::vector<encoder> folded(const encoder& base, const std::vector<updates>& adapters)
{
    std::vector<encoder> models;
    for (const auto& adapter : adapters) { models.push_back(folded(base, adapter)); }
    return models;
}

updates summed(const std::vector<updates>& adapters)
{
    return taskvec::merge_linear<float>(one_thread, adapters).adapter;
}

updates elected(const std::vector<updates>& adapters, double density)
{
    const taskvec::adapter_ties_options options{.ties = {.density = density}, .rank = taskvec::rank_choice::full()};
    return taskvec::merge_ties<float>(one_thread, adapters, options, taskvec::decompose_randomized{}).adapter;
}

compressed_updates truncated(const updates& adapter, std::size_t q)
{
    return taskvec::peru_lora(one_thread, adapter, {.rank = {.rank = q}});
}

void save(const updates& adapter, const std::filesystem::path& folder)
{
    taskvec::peft_adapter<float> stored;
    stored.updates = adapter;
    taskvec::write_peft(folder, stored);
}

updates load_updates(const std::filesystem::path& folder)
{
    return taskvec::read_peft<float>(folder).updates;
}

void save_linearized(const network& base, const adapter& initial, const std::vector<adapter>& adapters,
    const std::filesystem::path& folder)
{
    save_base(base, folder);
    save(updates_of(initial), folder / "llora-init");
    for (std::size_t task = 0; task < tasks; ++task) {
        save(updates_of(adapters[task]), folder / "llora" / task_names[task]);
    }
}

std::vector<std::vector<double>> spectra(const updates& adapter)
{
    std::vector<std::vector<double>> all;
    for (const auto& [module, update] : adapter) {
        all.push_back(
            taskvec::factored_svd(one_thread, update.factors(1, module), taskvec::rank_choice::full()).spectrum);
    }
    return all;
}

updates combined(const std::vector<updates>& adapters, const std::vector<double>& weights)
{
    return taskvec::merge_linear<float>(one_thread, adapters, {.weights = weights}).adapter;
}

} // namespace digits
