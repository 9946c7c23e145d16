// NLopt's COBYLA as LoraHub's optimiser. Needs NLopt (Debian: libnlopt-dev) and its library: CMake's NLopt::nlopt, or
// -lnlopt.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/search/lorahub.hpp>

#if !__has_include(<nlopt.h>)
#error "this header of taskvec needs NLopt (Debian: libnlopt-dev)"
#include "taskvec: the error above ends the compilation"
#endif
#include <nlopt.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>
#if !defined(TASKVEC_NO_EXCEPTIONS)
#include <exception>
#endif

namespace taskvec::inline TASKVEC_ABI {

/// COBYLA (Powell 1994): linear interpolation of the objective over a simplex that shrinks. Deterministic. The paper
/// uses Shiwa, which chooses among several optimisers and is not to be had in C++: a deviation. An optimiser of
/// lorahub(). Ends when the budget is spent, or when no weight moves by more than `tolerance`. Errors: backend_error
/// with NLopt's code.
///
///     auto found = lorahub(cpu{}, {}, base, tasks, out, loss, cobyla{});
struct cobyla {
    double step = 0.5; ///< size of the first simplex
    double tolerance = 1e-4; ///< the weights' change that ends it

    /// Minimises `objective` within problem.lower and problem.upper, from problem.start on.
    void operator()(const lorahub_problem& problem, const lorahub_objective& objective) const
    {
        if (!(step > 0) || !std::isfinite(step)) {
            raise<invalid_argument>(error_code::inputs_empty,
                message("COBYLA's step is ", step, "; expected a positive number, such as 0.5"));
        }
        const std::unique_ptr<std::remove_pointer_t<nlopt_opt>, void (*)(nlopt_opt)> search(
            nlopt_create(NLOPT_LN_COBYLA, static_cast<unsigned>(problem.dimension)), &nlopt_destroy);
        if (!search) {
            raise<backend_error>(
                error_code::out_of_memory, "out of memory", "nlopt_create", static_cast<int>(NLOPT_OUT_OF_MEMORY));
        }
        state now{&objective, search.get()};
        const auto check = [](nlopt_result code, const char* call) {
            if (code < 0) {
                raise<backend_error>(error_code::optimizer_failed, "NLopt refused", call, static_cast<int>(code));
            }
        };
        check(nlopt_set_min_objective(search.get(), &state::evaluate, &now), "nlopt_set_min_objective");
        check(nlopt_set_lower_bounds1(search.get(), problem.lower), "nlopt_set_lower_bounds1");
        check(nlopt_set_upper_bounds1(search.get(), problem.upper), "nlopt_set_upper_bounds1");
        check(nlopt_set_maxeval(search.get(), static_cast<int>(problem.evaluations)), "nlopt_set_maxeval");
        check(nlopt_set_xtol_abs1(search.get(), tolerance), "nlopt_set_xtol_abs1");
        check(nlopt_set_initial_step1(search.get(), std::min(step, (problem.upper - problem.lower) / 2)),
            "nlopt_set_initial_step1");
        std::vector<double> weights = problem.start;
        double lowest = 0;
        const nlopt_result code = nlopt_optimize(search.get(), weights.data(), &lowest);
#if !defined(TASKVEC_NO_EXCEPTIONS)
        if (now.failure) { std::rethrow_exception(now.failure); }
#endif
        if (code < 0 && code != NLOPT_ROUNDOFF_LIMITED) {
            const char* const reason = nlopt_get_errmsg(search.get());
            raise<backend_error>(error_code::optimizer_failed, reason ? reason : "COBYLA failed", "nlopt_optimize",
                static_cast<int>(code));
        }
    }

private:
    struct state {
        const lorahub_objective* objective;
        nlopt_opt search;
#if !defined(TASKVEC_NO_EXCEPTIONS)
        std::exception_ptr failure{};
#endif

        /// What NLopt calls: no exception may pass through C.
        static double evaluate(unsigned n, const double* weights, double*, void* data)
        {
            auto& self = *static_cast<state*>(data);
#if defined(TASKVEC_NO_EXCEPTIONS)
            return (*self.objective)({weights, n});
#else
            try {
                return (*self.objective)({weights, n});
            }
            catch (...) {
                if (!self.failure) { self.failure = std::current_exception(); }
                nlopt_force_stop(self.search);
                return std::numeric_limits<double>::max();
            }
#endif
        }
    };
};

} // namespace taskvec::inline TASKVEC_ABI
