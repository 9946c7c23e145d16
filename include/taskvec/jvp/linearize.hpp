// linearize(f, φ0): the first-order expansion of a whole network in its parameters, or in any subset of them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/jvp.hpp>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which parameters a linearization is in.
struct linearize_options {
    std::vector<std::string> active{}; ///< names; empty: all parameters (full linearization)
};

/// f_lin(x; φ) = f(x; φ0) + ∇φ f(x; φ0)·(φ − φ0), made by linearize(). Exactly linear in φ; equal to f at φ0.
///
/// With all parameters active it is the full linearization of Ortiz-Jimenez, Favero, Frossard, "Task arithmetic in the
/// tangent space" (2023). With only the adapters active it is the *whole-network* reading of L-LoRA (Tang et al. 2024,
/// Eq. 4); the per-layer reading is linearized_lora_layer. It does not fold into a plain network.
template <class F, differentiable_scalar T>
class linearized {
public:
    /// See linearize(), which makes it and deduces the types. Errors: invalid_argument for active names that are not
    /// there.
    linearized(F f, parameters<T> initial, linearize_options options)
        : f_(std::move(f))
        , initial_(std::move(initial))
        , active_(std::move(options.active))
    {
        for (const auto& name : active_) {
            if (!initial_.contains(name)) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message("linearize: parameter '", name, "' is to be active, but there is no such parameter"));
            }
        }
        if (active_.empty()) {
            for (const auto& [name, value] : initial_) { active_.push_back(name); }
        }
        std::sort(active_.begin(), active_.end());
        active_.erase(std::unique(active_.begin(), active_.end()), active_.end());
    }

    /// f_lin(inputs; φ). `phi` names active parameters (missing ones stay at φ0) and may repeat inactive ones
    /// unchanged. Throws invalid_argument for an unknown name and for an inactive parameter that differs from φ0,
    /// shape_mismatch. Cost: one jvp, and one pass over the active parameters.
    template <class... Inputs>
    [[nodiscard]] auto operator()(const parameters<T>& phi, const Inputs&... inputs) const
    {
        parameters<T> delta;
        for (const auto& [name, value] : phi) {
            const auto& start = initial_value(name);
            if (value.rows() != start.rows() || value.cols() != start.cols()) {
                raise<shape_mismatch>(error_code::tensor_shape,
                    message("linearize: parameter '", name, "' is [", value.rows(), ", ", value.cols(),
                        "], at φ0 it is [", start.rows(), ", ", start.cols(), "]"));
            }
            // A parameter that has not moved has a tangent of zero: no work.
            if (value == start) { continue; }
            require_active(name);
            delta.insert(name, value - start);
        }
        return sum(jvp(f_, initial_, delta, inputs...));
    }

    /// f_lin at φ0 + delta; delta names active parameters only. Throws as operator().
    template <class... Inputs>
    [[nodiscard]] auto at_difference(const parameters<T>& delta, const Inputs&... inputs) const
    {
        return sum(derivative(delta, inputs...));
    }

    /// f(inputs; φ0) and its derivative along `tangents`, which name active parameters only (else invalid_argument).
    template <class... Inputs>
    [[nodiscard]] auto derivative(const parameters<T>& tangents, const Inputs&... inputs) const
    {
        for (const auto& [name, value] : tangents) { require_active(name); }
        return jvp(f_, initial_, tangents, inputs...);
    }

    /// The gradient in φ of ⟨cotangent, f_lin⟩, which does not depend on φ: the vjp of f at φ0. `f_vjp(φ0, cotangent,
    /// inputs…)` returns the gradients by name; those of active parameters are kept, and each must be there.
    template <class Vjp, class Cotangent, class... Inputs>
    [[nodiscard]] parameters<T> gradient(const Vjp& f_vjp, const Cotangent& cotangent, const Inputs&... inputs) const
    {
        const parameters<T> all = f_vjp(initial_, cotangent, inputs...);
        parameters<T> kept;
        for (const auto& name : active_) {
            const auto* value = all.find(name);
            if (!value) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message("linearize: the vjp returned no gradient for the active parameter '", name, "'"));
            }
            detail::check_same_shape("linearize: the gradient of '" + name + "'", *value, initial_[name]);
            kept.insert(name, *value);
        }
        return kept;
    }

    /// φ0.
    [[nodiscard]] const parameters<T>& initial() const noexcept { return initial_; }
    /// The names of the active parameters, sorted.
    [[nodiscard]] const std::vector<std::string>& active() const noexcept { return active_; }

private:
    const row_matrix<T>& initial_value(const std::string& name) const
    {
        const auto* value = initial_.find(name);
        if (!value) {
            raise<invalid_argument>(
                error_code::tensor_missing, message("linearize: there is no parameter '", name, "'"));
        }
        return *value;
    }
    void require_active(const std::string& name) const
    {
        (void)initial_value(name);
        if (!std::binary_search(active_.begin(), active_.end(), name)) {
            raise<invalid_argument>(error_code::parameter_inactive,
                message("linearize: parameter '", name,
                    "' is inactive and must stay at φ0; name it in linearize_options::active to move it"));
        }
    }
    template <class Value>
    static Value sum(jvp_result<Value>&& parts)
    {
        parts.primal += parts.tangent;
        return std::move(parts.primal);
    }

    F f_;
    parameters<T> initial_;
    std::vector<std::string> active_;
};

/// The linearization of f(φ, inputs…) around φ0 in the parameters that `options.active` names (default: all).
/// f is a generic function of active_parameters<T> and the inputs, written on this library's operations.
/// Throws invalid_argument for an active name that φ0 lacks.
///
///     auto f_lin = linearize(f, phi0, {.active = {"q.lora_A", "q.lora_B"}});
///     auto y = f_lin(phi, images);
template <class F, differentiable_scalar T>
[[nodiscard]] linearized<F, T> linearize(F f, parameters<T> initial, linearize_options options = {})
{
    return {std::move(f), std::move(initial), std::move(options)};
}

} // namespace taskvec::inline TASKVEC_ABI
