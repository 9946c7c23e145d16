// SPDX-License-Identifier: Apache-2.0
#include "cost.hpp"

#include <taskvec/jvp/linearize.hpp>

#include <algorithm>
#include <ctime>
#include <fstream>
#include <functional>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace minilm {
namespace {

using matrix = row_matrix<float>;

double processor_milliseconds()
{
    timespec now{};
    ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) / 1e6;
}

/// A field of /proc/self/status in kB; 0 where it is not there.
double status(const std::string& field)
{
    std::ifstream file("/proc/self/status");
    for (std::string word; file >> word;) {
        double value = 0;
        if (word == field + ":" && file >> value) { return value; }
    }
    return 0;
}

/// Medians of time, and the largest growth of memory.
void measure(const std::function<void()>& work, std::size_t repetitions, double& time, double& memory)
{
    work(); // once for the caches
    std::vector<double> times;
    memory = 0;
    for (std::size_t i = 0; i < repetitions; ++i) {
#if defined(__GLIBC__)
        ::malloc_trim(0); // what is free but resident would hide growth
#endif
        std::ofstream("/proc/self/clear_refs") << 5; // the peak begins anew
        const double before = status("VmRSS"), begin = processor_milliseconds();
        work();
        times.push_back(processor_milliseconds() - begin);
        if (before > 0) { memory = std::max(memory, (status("VmHWM") - before) / 1e3); }
    }
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
    time = times[times.size() / 2];
}

void descend(parameters<float>& p, const parameters<float>& gradients)
{
    for (const auto& [name, gradient] : gradients) { p[name] -= 1e-6f * gradient; }
}

double millions(const parameters<float>& p)
{
    double count = 0;
    for (const auto& [name, value] : p) { count += static_cast<double>(value.size()); }
    return count / 1e6;
}

} // namespace

std::vector<cost> measure_cost(const loaded& model, const cost_options& options)
{
    batch b{.ids = {}, .length = options.length};
    const taskvec::random_stream draws(0, 0, "ids");
    for (Eigen::Index i = 0; i < options.texts * options.length; ++i) {
        b.ids.push_back(static_cast<std::int64_t>(
            draws.uniform(static_cast<std::uint64_t>(i)) * static_cast<double>(model.shape.vocabulary - 1)));
    }
    const matrix cotangent = matrix::Constant(options.texts, model.shape.width, 1e-3f);
    const network<float> plain{.shape = model.shape};
    std::vector<cost> costs;
    const auto add = [&](const std::string& way, double trained, const std::function<void()>& forward,
                         const std::function<void()>& step) {
        cost one{.way = way, .trained = trained};
        measure(forward, options.repetitions, one.forward, one.forward_memory);
        measure(step, options.repetitions, one.step, one.step_memory);
        costs.push_back(one);
    };
    {
        parameters<float> p = model.values;
        add(
            "full fine-tuning", millions(p), [&] { (void)embed(plain, p, b); },
            [&] {
                tape<float> record;
                (void)embed(plain, p, b, &record);
                descend(p, gradient(plain, p, b, record, cotangent));
            });
    }
    {
        parameters<float> phi = model.values;
        std::vector<std::string> names;
        for (const auto& [name, value] : phi) { names.push_back(name); }
        for (const auto& name : names) { phi[name] *= 1.001f; } // at φ0 itself there is no tangent to carry
        const auto linearized = taskvec::linearize(
            [&](const auto& p, const batch& texts) { return embed(plain, p, texts); }, model.values, {.active = names});
        add(
            "full linearization", millions(phi), [&] { (void)linearized(phi, b); },
            [&] {
                (void)linearized(phi, b); // where the loss gradient comes from; its vjp is that of the network at φ0
                tape<float> record;
                (void)embed(plain, model.values, b, &record);
                descend(phi, gradient(plain, model.values, b, record, cotangent));
            });
    }
    const auto start = initial_adapters<float>(model.shape, options.rank, 0);
    {
        parameters<float> p = model.values;
        for (const auto& [name, value] : start) { p.insert(name, value); }
        const network<float> net{.shape = model.shape, .scaling = 2};
        add(
            "LoRA", millions(start), [&] { (void)embed(net, p, b); },
            [&] {
                tape<float> record{.dense = false};
                (void)embed(net, p, b, &record);
                descend(p, gradient(net, p, b, record, cotangent));
            });
    }
    {
        network<float> net{.shape = model.shape, .scaling = 2};
        for (const auto& [name, a] : start) {
            if (!name.ends_with(".lora_A")) { continue; }
            const std::string projection = name.substr(0, name.size() - 7);
            net.linearized.insert(projection,
                taskvec::linearized_lora_layer<float>(model.values[projection + ".weight"],
                    model.values[projection + ".bias"],
                    taskvec::make_lora(start[projection + ".lora_B"], a, net.scaling)));
        }
        add(
            "L-LoRA", millions(start), [&] { (void)embed(net, model.values, b); },
            [&] {
                tape<float> record{.dense = false};
                (void)embed(net, model.values, b, &record);
                for (const auto& [name, step] : gradient(net, model.values, b, record, cotangent)) {
                    auto& layer = net.linearized[name.substr(0, name.size() - 7)];
                    if (name.ends_with(".lora_A")) { layer.delta_a() -= 1e-6f * step; }
                    else {
                        layer.b() -= 1e-6f * step;
                    }
                }
            });
    }
    return costs;
}

} // namespace minilm
