// Fine-tunes a small vision transformer on handwritten digits in every way that the second paper compares, and prints
// accuracy, time and memory of each: the paper's table 4, measured here.
// SPDX-License-Identifier: Apache-2.0
//
//     vit                    100 steps a task, 64 images a step
//     vit 50 table.csv       50 steps; the table as CSV, too
#include "memory.hpp"
#include "paradigm.hpp"

#include "../digits/data.hpp"
#include "../digits/train.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

namespace {

using matrix = taskvec::row_matrix<float>;
using network = vit::model<float>;

constexpr std::uint64_t seed = 1;
constexpr vit::shape network_shape{};
constexpr vit::adapter_shape adapter{.rank = 8, .scaling = 2};
constexpr std::size_t task_list[] = {0, 4, 6}; // rotated by 90°, mirrored, inverted
constexpr double rates[] = {1e-3, 3e-3, 1e-2};

matrix inputs(const digits::dataset& data)
{
    return vit::patches(matrix(data.inputs), network_shape);
}

double accuracy(const network& model, const digits::dataset& data)
{
    const matrix y = model.forward(inputs(data));
    std::size_t right = 0;
    for (Eigen::Index row = 0; row < y.rows(); ++row) {
        Eigen::Index best = 0;
        y.row(row).maxCoeff(&best);
        right += best == data.labels[static_cast<std::size_t>(row)];
    }
    return static_cast<double>(right) / static_cast<double>(data.size());
}

void train(network& model, const digits::dataset& data, int steps, double rate, std::string_view stream)
{
    for (int step = 0; step < steps; ++step) {
        const auto batch = digits::random_batch(data, 64, seed, step, stream);
        model.update(model.loss_gradient(inputs(batch), batch.labels), digits::cosine_decay(rate, step, steps));
    }
}

/// All eight domains in one: what the base sees.
digits::dataset mixed(const digits::dataset& images)
{
    digits::dataset all;
    const auto domains = digits::in_every_domain(images);
    all.inputs.resize(static_cast<Eigen::Index>(images.size() * domains.size()), images.inputs.cols());
    Eigen::Index row = 0;
    for (const auto& domain : domains) {
        all.inputs.middleRows(row, domain.inputs.rows()) = domain.inputs;
        all.labels.insert(all.labels.end(), domain.labels.begin(), domain.labels.end());
        row += domain.inputs.rows();
    }
    return all;
}

double median(std::vector<double> values)
{
    std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
}

struct figures {
    std::size_t trained = 0;
    double rate = 0, accuracy = 0;
    double forward_ms = 0, step_ms = 0;
    double forward_mib = -1, step_mib = -1;
};

/// Time and memory of a forward pass and of a training step (forward, gradient and update) on a batch of 64. The models
/// take turns, so that whatever else the machine does meets all of them.
void measure(std::vector<std::unique_ptr<network>>& models, const digits::dataset& data, std::vector<figures>& table)
{
    const auto batch = digits::random_batch(data, 64, seed, 0, "measure");
    const matrix x = inputs(batch);
    std::vector<std::vector<double>> forward(models.size()), step(models.size());
    const auto milliseconds = [](const auto& work) {
        const auto begin = std::chrono::steady_clock::now();
        work();
        return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    };
    const auto mebibytes = [](const auto& work) {
        vit::start_peak();
        work();
        const auto peak = vit::peak_bytes();
        return peak ? static_cast<double>(*peak) / (1 << 20) : -1.0;
    };
    for (int round = 0; round < 21; ++round) {
        for (std::size_t i = 0; i < models.size(); ++i) {
            network& model = *models[i];
            const auto run_forward = [&] { (void)model.forward(x); };
            const auto run_step = [&] { model.update(model.loss_gradient(x, batch.labels), 0); };
            forward[i].push_back(milliseconds(run_forward));
            step[i].push_back(milliseconds(run_step));
            if (round == 0) {
                table[i].forward_mib = mebibytes(run_forward);
                table[i].step_mib = mebibytes(run_step);
            }
        }
    }
    for (std::size_t i = 0; i < models.size(); ++i) {
        table[i].forward_ms = median(forward[i]);
        table[i].step_ms = median(step[i]);
    }
}

void run(int steps, const char* csv)
{
    const auto parts = digits::split(digits::load_images(DIGITS_DATA_FILE), seed);

    // A weak base: 100 images in all eight domains.
    std::vector<std::size_t> few(100);
    for (std::size_t i = 0; i < few.size(); ++i) { few[i] = i; }
    const auto start = vit::initial_parameters<float>(network_shape, seed);
    taskvec::parameters<float> base = start;
    {
        const auto data = mixed(digits::subset(parts.train, few));
        network pretrained(vit::paradigm::full, network_shape, start, adapter, seed);
        train(pretrained, data, 200, 1e-3, "pre-training");
        base = pretrained.values();
    }

    std::vector<figures> table(vit::paradigms.size());
    std::vector<std::unique_ptr<network>> last;
    double before = 0;
    for (const auto task : task_list) {
        before += accuracy(network(vit::paradigm::full, network_shape, base, adapter, seed),
                      digits::in_domain(parts.test, task))
            / std::size(task_list);
    }
    for (std::size_t i = 0; i < vit::paradigms.size(); ++i) {
        const auto fresh = [&] {
            return std::make_unique<network>(vit::paradigms[i], network_shape, base, adapter, seed);
        };
        // The learning rate is chosen on the validation images of the first task.
        double best = -1;
        const auto first = digits::in_domain(parts.train, task_list[0]),
                   validation = digits::in_domain(parts.validation, task_list[0]);
        for (const double rate : rates) {
            const auto model = fresh();
            train(*model, first, steps, rate, "fine-tuning");
            const double score = accuracy(*model, validation);
            if (score > best) {
                best = score;
                table[i].rate = rate;
            }
        }
        for (const auto task : task_list) {
            auto model = fresh();
            train(*model, digits::in_domain(parts.train, task), steps, table[i].rate, "fine-tuning");
            table[i].accuracy += accuracy(*model, digits::in_domain(parts.test, task)) / std::size(task_list);
            if (task == task_list[0]) {
                table[i].trained = model->trained_parameters();
                last.push_back(std::move(model));
            }
        }
        std::fprintf(stderr, "%s: done\n", std::string(name(vit::paradigms[i])).c_str());
    }
    measure(last, digits::in_domain(parts.train, task_list[0]), table);

    std::printf("A vision transformer of %lld blocks, width %lld, %lld tokens, fine-tuned on digits: mean test "
                "accuracy over %zu tasks (the base: %.1f%%)\n",
        static_cast<long long>(network_shape.blocks), static_cast<long long>(network_shape.width),
        static_cast<long long>(network_shape.tokens()), std::size(task_list), 100 * before);
    std::printf("Forward pass and training step on 64 images, one thread; in brackets over full fine-tuning\n\n");
    std::printf("%-22s %10s %9s %18s %18s %18s %18s\n", "", "trained", "accuracy", "forward, ms", "step, ms",
        "forward, MiB", "step, MiB");
    const auto cell = [](double value, double reference, int decimals) {
        char text[64];
        if (value < 0) { return std::string("not counted"); }
        std::snprintf(text, sizeof text, "%.*f (%.2f)", decimals, value, value / reference);
        return std::string(text);
    };
    for (std::size_t i = 0; i < table.size(); ++i) {
        const auto& f = table[i];
        std::printf("%-22s %10zu %8.1f%% %18s %18s %18s %18s\n", std::string(name(vit::paradigms[i])).c_str(),
            f.trained, 100 * f.accuracy, cell(f.forward_ms, table[0].forward_ms, 2).c_str(),
            cell(f.step_ms, table[0].step_ms, 2).c_str(), cell(f.forward_mib, table[0].forward_mib, 2).c_str(),
            cell(f.step_mib, table[0].step_mib, 2).c_str());
    }
    if (!csv) { return; }
    std::ofstream out(csv);
    out << "paradigm,trained_parameters,learning_rate,accuracy,forward_ms,step_ms,forward_mib,step_mib\n";
    for (std::size_t i = 0; i < table.size(); ++i) {
        const auto& f = table[i];
        out << '"' << name(vit::paradigms[i]) << "\"," << f.trained << ',' << f.rate << ',' << f.accuracy << ','
            << f.forward_ms << ',' << f.step_ms << ',' << f.forward_mib << ',' << f.step_mib << '\n';
    }
    if (!out.flush()) { throw std::runtime_error(std::string(csv) + ": cannot be written"); }
}

} // namespace

int main(int argc, char** argv)
{
    try {
        const int steps = argc > 1 ? std::atoi(argv[1]) : 100;
        if (steps < 1 || argc > 3) {
            std::fprintf(stderr, "usage: vit [steps] [table.csv]\n");
            return 2;
        }
        run(steps, argc > 2 ? argv[2] : nullptr);
        return 0;
    }
    catch (const std::exception& e) {
        std::fprintf(stderr, "vit: error: %s\n", e.what());
        return 1;
    }
}
