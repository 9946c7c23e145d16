// The ways of fine-tuning that the second paper compares, on one network: full, fully linearized, LoRA, and linearized
// LoRA in both of its readings.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "vision_transformer.hpp"

#include <taskvec/jvp/jvp.hpp>

#include <array>
#include <cmath>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vit {

enum class paradigm { full, full_linearized, lora, linearized_lora_layers, linearized_lora_network };

inline constexpr std::array paradigms{paradigm::full, paradigm::full_linearized, paradigm::lora,
    paradigm::linearized_lora_layers, paradigm::linearized_lora_network};

[[nodiscard]] inline std::string_view name(paradigm kind)
{
    switch (kind) {
    case paradigm::full: return "full fine-tuning";
    case paradigm::full_linearized: return "full linearization";
    case paradigm::lora: return "LoRA";
    case paradigm::linearized_lora_layers: return "L-LoRA, per layer";
    default: return "L-LoRA, whole network";
    }
}

/// A network that is fine-tuned from the base in one of these ways.
template <class T>
class model {
public:
    using matrix = row_matrix<T>;

    model(paradigm kind, const shape& s, const parameters<T>& base, const adapter_shape& adapter, std::uint64_t seed)
        : kind_(kind)
        , net_{.shape = s, .scaling = adapter.scaling}
        , values_(base)
    {
        const auto adapters = initial_adapters<T>(s, adapter, seed);
        switch (kind) {
        case paradigm::full:
        case paradigm::full_linearized:
            for (const auto& [name, value] : base) { trained_.push_back(name); }
            break;
        case paradigm::linearized_lora_layers:
            for (const auto& [name, a] : adapters) {
                trained_.push_back(name);
                if (!name.ends_with(".lora_A")) { continue; }
                const std::string projection = name.substr(0, name.size() - 7);
                // values_ is never changed again, so the layers may borrow from it.
                net_.linearized.insert(projection,
                    taskvec::linearized_lora_layer<T>(values_[projection + ".weight"], values_[projection + ".bias"],
                        taskvec::make_lora(adapters[projection + ".lora_B"], a, adapter.scaling)));
            }
            break;
        default:
            for (const auto& [name, value] : adapters) {
                trained_.push_back(name);
                values_.insert(name, value);
            }
        }
        if (linearized_network()) {
            for (const auto& name : trained_) {
                difference_.insert(name, matrix::Zero(values_[name].rows(), values_[name].cols()));
            }
        }
    }
    model(const model&) = delete;
    model& operator=(const model&) = delete;

    [[nodiscard]] paradigm kind() const { return kind_; }
    /// Names of what is trained: the network's parameters, or the adapters' lora_A and lora_B.
    [[nodiscard]] const std::vector<std::string>& trained_names() const { return trained_; }
    /// One of them, to be moved: θ or φ itself, or θ − θ0, φ − φ0 where the network is linearized (and ΔA of a layer
    /// that is).
    [[nodiscard]] Eigen::Ref<matrix> trained(const std::string& name)
    {
        if (linearized_network()) { return difference_[name]; }
        if (kind_ != paradigm::linearized_lora_layers) { return values_[name]; }
        auto& layer = net_.linearized[name.substr(0, name.size() - 7)];
        return name.ends_with("A") ? layer.delta_a() : layer.b();
    }
    /// Numbers that training changes. With B0 = 0 the A of a linearized adapter is among them, though its gradient is
    /// 0.
    [[nodiscard]] std::size_t trained_parameters() const
    {
        std::size_t count = 0;
        for (const auto& name : trained_) {
            if (kind_ != paradigm::linearized_lora_layers) { count += static_cast<std::size_t>(values_[name].size()); }
            else {
                const auto& layer = net_.linearized[name.substr(0, name.size() - 7)];
                count += static_cast<std::size_t>(
                    name.ends_with("A") ? layer.rank() * layer.weight().cols() : layer.rank() * layer.weight().rows());
            }
        }
        return count;
    }

    /// The parameters of the network: what has been trained, or θ0 and φ0 where the network is linearized.
    [[nodiscard]] const parameters<T>& values() const { return values_; }

    /// Logits for patches().
    [[nodiscard]] matrix forward(const matrix& x, tape<T>* record = nullptr) const
    {
        if (!linearized_network()) { return logits(net_, values_, x, record); }
        // f(x; φ0) + ∇f(x; φ0)·(φ − φ0); the tape has the values at φ0.
        auto [value, derivative] =
            taskvec::jvp([&](const auto& p) { return logits(net_, p, x, record); }, values_, difference_);
        value += derivative;
        return std::move(value);
    }

    /// The gradient of the mean cross-entropy with respect to everything that is trained.
    [[nodiscard]] parameters<T> loss_gradient(const matrix& x, const std::vector<int>& labels) const
    {
        tape<T> record{.dense = kind_ == paradigm::full || kind_ == paradigm::full_linearized};
        const matrix y = forward(x, &record);
        return gradient(net_, values_, x, record, taskvec::cross_entropy_vjp(y, labels));
    }

    /// One step of Adam.
    void update(const parameters<T>& gradients, double rate)
    {
        ++steps_;
        const auto correction = static_cast<T>(std::sqrt(1 - std::pow(0.999, steps_)) / (1 - std::pow(0.9, steps_)));
        for (const auto& name : trained_) {
            const matrix& g = gradients[name];
            auto& [mean, square] =
                moments_.try_emplace(name, matrix::Zero(g.rows(), g.cols()), matrix::Zero(g.rows(), g.cols()))
                    .first->second;
            mean = T(0.9) * mean + T(0.1) * g;
            square.array() = T(0.999) * square.array() + T(0.001) * g.array().square();
            trained(name) -=
                (static_cast<T>(rate) * correction * mean.array() / (square.array().sqrt() + T(1e-8))).matrix();
        }
    }

private:
    [[nodiscard]] bool linearized_network() const
    {
        return kind_ == paradigm::full_linearized || kind_ == paradigm::linearized_lora_network;
    }

    paradigm kind_;
    network<T> net_;
    parameters<T> values_; // θ0 or φ0 of a linearized network, otherwise what is trained
    parameters<T> difference_; // φ − φ0 of a linearized network
    std::vector<std::string> trained_;
    std::map<std::string, std::pair<matrix, matrix>> moments_;
    int steps_ = 0;
};

} // namespace vit
