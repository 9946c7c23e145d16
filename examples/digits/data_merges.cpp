// SPDX-License-Identifier: Apache-2.0
#include "data_merges.hpp"

#include "merging.hpp"

#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/formats/statistics.hpp>
#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/regmean.hpp>

#include <array>
#include <cmath>
#include <utility>

namespace digits {
namespace {

taskvec::matrix_view<const float> rows_of(const matrix& x)
{
    return {x.data(), static_cast<std::size_t>(x.rows()), static_cast<std::size_t>(x.cols()),
        taskvec::matrix_order::row_major};
}

/// The gradients of one example's log-likelihood, one for each label that it might have, up to their sign.
void label_gradients(const encoder& model, const matrix& head, const matrix& input, const activations& out,
    Eigen::Index example, const Eigen::Array<double, 1, classes>& probabilities,
    std::array<encoder, classes>& gradients)
{
    matrix by_logits(classes, classes);
    for (int label = 0; label < classes; ++label) {
        by_logits.row(label) = probabilities.cast<float>();
        by_logits(label, label) -= 1.0f;
    }
    matrix second = by_logits * head;
    second.array().rowwise() *= (out.features.row(example).array() > 0.0f).cast<float>();
    matrix shallow = second * model.weight2();
    shallow.array().rowwise() *= (out.hidden.row(example).array() > 0.0f).cast<float>();
    for (int label = 0; label < classes; ++label) {
        encoder& gradient = gradients[static_cast<std::size_t>(label)];
        gradient.bias2() = second.row(label);
        gradient.weight2().noalias() = second.row(label).transpose() * out.hidden.row(example);
        gradient.bias1() = shallow.row(label);
        gradient.weight1().noalias() = shallow.row(label).transpose() * input.row(example);
    }
}

/// Statistics as models of f64 tensors, which the merges read.
class statistics_model {
public:
    explicit statistics_model(const taskvec::fisher_accumulator& fisher)
    {
        for (std::size_t i = 0; i < fisher.parameters().size(); ++i) {
            add(fisher.parameters()[i].name, fisher.parameters()[i].shape, fisher.fisher(i));
        }
    }
    explicit statistics_model(const std::map<std::string, taskvec::gram_accumulator>& grams)
    {
        for (const auto& [name, gram] : grams) {
            const auto n = static_cast<std::int64_t>(gram.features());
            const taskvec::matrix<double> both_halves = gram.matrix();
            add(name, {n, n}, {both_halves.data(), both_halves.data() + both_halves.size()});
        }
    }
    [[nodiscard]] taskvec::const_model_ref model() const
    {
        taskvec::const_model_ref all;
        for (const auto& [name, tensor] : tensors_) {
            all.insert(name, taskvec::const_tensor_ref{tensor.values.data(), taskvec::dtype::f64, tensor.shape});
        }
        return all;
    }

private:
    struct tensor {
        taskvec::extents shape;
        std::vector<double> values;
    };
    void add(const std::string& name, taskvec::extents shape, std::vector<double> values)
    {
        tensors_.emplace(name, tensor{std::move(shape), std::move(values)});
    }

    std::map<std::string, tensor> tensors_;
};

std::vector<taskvec::const_model_ref> views(const std::vector<statistics_model>& held)
{
    std::vector<taskvec::const_model_ref> all;
    for (const auto& one : held) { all.push_back(one.model()); }
    return all;
}

} // namespace

statistics collect(const encoder& model, const matrix& head, const dataset& train)
{
    statistics known{taskvec::expected_fisher_accumulator(model.model()),
        {{"fc1.weight", taskvec::gram_accumulator(pixels, "fc1")},
            {"fc2.weight", taskvec::gram_accumulator(hidden, "fc2")}}};

    const dataset seen = first(train, gram_images);
    const activations out = forward(model, head, seen.inputs);
    known.grams.at("fc1.weight").add(one_thread, rows_of(seen.inputs));
    known.grams.at("fc2.weight").add(one_thread, rows_of(out.hidden));

    std::array<encoder, classes> gradients;
    std::vector<taskvec::const_model_ref> views;
    for (const auto& gradient : gradients) { views.push_back(gradient.model()); }
    for (Eigen::Index example = 0; example < static_cast<Eigen::Index>(fisher_images); ++example) {
        const Eigen::Array<double, 1, classes> logits = out.logits.row(example).cast<double>();
        Eigen::Array<double, 1, classes> probabilities = (logits - logits.maxCoeff()).exp();
        probabilities /= probabilities.sum();
        label_gradients(model, head, seen.inputs, out, example, probabilities, gradients);
        known.fisher.add(one_thread, views, std::span<const double>(probabilities.data(), classes));
    }
    return known;
}

std::vector<statistics> collect(const setting& s, const std::vector<encoder>& models)
{
    std::vector<statistics> known;
    for (std::size_t task = 0; task < tasks; ++task) {
        known.push_back(collect(models[task], s.base.head, s.train[task]));
    }
    return known;
}

encoder fisher_merged(const setting& s, const std::vector<encoder>& models, const std::vector<statistics>& known)
{
    std::vector<statistics_model> fishers;
    for (const auto& task : known) { fishers.emplace_back(task.fisher); }
    return merged(taskvec::fisher_options{.fishers = views(fishers)}, s.base.body, models);
}

choice<regmean_choice> tuned_regmean(
    const setting& s, const std::vector<encoder>& models, const std::vector<statistics>& known)
{
    std::vector<statistics_model> grams;
    for (const auto& task : known) { grams.emplace_back(task.grams); }
    choice<regmean_choice> best;
    for (const double alpha : grid(0.1, 0.9, 0.1)) {
        const encoder model =
            merged(taskvec::regmean_options{.grams = views(grams), .alpha = alpha, .ridge = 1e-6}, s.base.body, models);
        best.offer({model, alpha}, mean(evaluate(model, s.base.head, s.validation)));
    }
    return best;
}

void save(const std::vector<statistics>& known, const std::vector<encoder>& models, const std::filesystem::path& folder)
{
    std::filesystem::create_directories(folder);
    for (std::size_t task = 0; task < tasks; ++task) {
        const std::uint64_t stamp = taskvec::fingerprint(one_thread, models[task].model());
        taskvec::write_statistics(
            folder / taskvec::message(task_names[task], ".fisher.safetensors"), known[task].fisher, stamp);
        taskvec::write_statistics(
            folder / taskvec::message(task_names[task], ".gram.safetensors"), known[task].grams, stamp);
    }
}

} // namespace digits
