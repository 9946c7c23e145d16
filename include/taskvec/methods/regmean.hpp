// RegMean: Jin, Ren, Preotiuc-Pietro and Cheng, "Dataless knowledge fusion by merging weights of language models" (ICLR
// 2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/linalg/eigen.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/models/weight_layout.hpp>
#include <taskvec/statistics/aligned_grams.hpp>
#include <taskvec/statistics/stored_gram.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory_resource>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each linear layer with a Gram matrix, in its in×out view W: W* = (Σ wt·G̃t)⁻¹ Σ wt·G̃t·Wt, with Gt = XtᵀXt over
/// the inputs of task t and G̃ = α·G + (1−α)·diag(G): the W that fits all tasks' outputs Xt·Wt best, in the sense of
/// least squares when α = 1. All other floating tensors are averaged: Σ wt·θt / Σ wt. Needs no base.
///
/// Computed as W̄ + (Σ wt·G̃t)⁻¹ Σ wt·G̃t·(Wt − W̄) with W̄ = Σ wt·Wt / Σ wt, which is the same, in f64 by a Cholesky
/// factor, and rounded once; relative error about 1e-16 times the condition number of Σ G̃. `ridge` adds ridge·mean(diag
/// Σ wt·G̃t) to the diagonal of the system: directions of which no input says anything then get the average, and so does
/// a layer that saw none. A singular system without it is an error.
///
/// `grams` holds a model for each task, with the same tensor names in all: under the name of a weight, its Gram matrix
/// (in×in, symmetric, f64, f32, bf16 or f16). gram_accumulator makes them, statistics_file reads them. `layout` says
/// how a weight of that name is stored (empty: out_in for all); it is never guessed from shapes. Weights wt: one for
/// each task, or none for all 1; not negative, not all 0. Errors: invalid_argument (not a Gram matrix; singular),
/// shape_mismatch, dtype_mismatch, nonfinite_error. Cost of a layer: n³/3 + (T + 1)·2·n²·p flops and 8·n² bytes for n
/// inputs, p outputs; small layers in parallel, large ones one after the other with their columns in parallel. Same
/// result for any number of threads.
///
///     merge(cpu{}, regmean_options{.grams = grams, .alpha = 0.9}, tasks, out);
struct regmean_options {
    std::vector<const_model_ref> grams{}; ///< of each task, by the names of its layers' weights
    double alpha = 0.9; ///< scale of the off-diagonals, in [0, 1]
    double ridge = 0; ///< share of the mean diagonal, such as 1e-6
    std::vector<double> weights{};
    /// How the weight of that name is stored; empty: out_in for all.
    std::function<weight_layout(std::string_view)> layout{};
    std::vector<std::string> labels{}; ///< names of the Gram models in messages; empty: "the Grams of task 1", …
};

template <>
struct options_of<regmean_options> {
    static constexpr option_table table{option_row("alpha", &regmean_options::alpha,
                                            "scale of the Grams' off-diagonals", {.at_least = 0, .at_most = 1}),
        option_row(
            "ridge", &regmean_options::ridge, "share of the mean diagonal added to it, such as 1e-6", {.at_least = 0}),
        weights_row(&regmean_options::weights)};
};

namespace detail {

/// What a RegMean merge is asked, checked: its weights, and the layers with their Gram matrices, which are in memory
/// space `space`.
class regmean_problem {
public:
    regmean_problem(const aligned_models& models, const regmean_options& options, memory_space space)
        : options_(options)
        , weights_(task_weights(options.weights, models, false))
        , grams_(models, options.grams, options.labels, options.layout, space)
    {
        for (const double weight : weights_) { total_ += weight; }
    }

    [[nodiscard]] std::span<const double> weights() const noexcept { return weights_; }
    [[nodiscard]] double total_weight() const noexcept { return total_; }
    [[nodiscard]] double alpha() const noexcept { return options_.alpha; }
    [[nodiscard]] const std::vector<detail::gram_layer>& layers() const noexcept { return grams_.layers(); }
    [[nodiscard]] const std::vector<companion>& companions() const noexcept { return grams_.companions(); }
    [[nodiscard]] std::string label(std::size_t t, const aligned_models& models) const
    {
        return grams_label(options_.labels, t, models);
    }
    /// Names the Gram matrix of a layer and task in messages.
    [[nodiscard]] std::string where(const detail::gram_layer& one, std::size_t t, const aligned_models& models) const
    {
        return message("the Gram matrix of '", models.tensors()[one.tensor].name, "' in ", label(t, models));
    }
    /// What is added to the diagonal of a layer's system of that trace.
    [[nodiscard]] double lift(const detail::gram_layer& one, double trace) const noexcept
    {
        if (trace == 0 && options_.ridge > 0) { return 1; } // no task has seen an input: the average, whatever is added
        return options_.ridge * trace / static_cast<double>(one.in);
    }
    /// Throws invalid_argument where the answer of factor_cholesky() says that a layer's system is singular. `unseen`:
    /// the first input whose diagonal is 0, or one.in.
    void check_determined(
        const detail::gram_layer& one, const aligned_models& models, double least_pivot, std::size_t unseen) const
    {
        // What storage rounded away in the Grams cannot be told from nothing.
        bool rounded = false;
        for (const auto& gram : one.grams) { rounded = rounded || gram.dtype != dtype::f64; }
        const double epsilon = rounded ? std::numeric_limits<float>::epsilon()
                                       : static_cast<double>(one.in) * std::numeric_limits<double>::epsilon();
        if (least_pivot > (options_.ridge > 0 ? 0.0 : epsilon)) { return; }
        raise<invalid_argument>(error_code::no_solution,
            message("the inputs of layer '", models.tensors()[one.tensor].name,
                "' do not determine its weight: the sum of its Gram matrices is singular",
                unseen < one.in ? message(" (input ", unseen, " was 0 in all batches)") : std::string(),
                options_.ridge > 0 ? ": raise ridge" : ": set ridge, such as 1e-6, or lower alpha"));
    }

private:
    regmean_options options_;
    call_vector<double> weights_;
    double total_ = 0;
    aligned_grams grams_;
};

} // namespace detail

template <>
class method<regmean_options> : public general_method {
public:
    static constexpr bool needs_base = false;

    [[nodiscard]] static std::vector<companion> companions(
        const regmean_options& options, const aligned_models& models, memory_space space)
    {
        return detail::regmean_problem(models, options, space).companions();
    }

    method(const cpu_passes& passes, const regmean_options& options)
        : models_(&passes.models())
        , problem_(passes.models(), options, memory_space::host)
    { }

    /// Weights of layers are read for their mean and again for their deviations, Grams once for the system and again
    /// for each panel.
    [[nodiscard]] std::uint64_t bytes_beside() const noexcept
    {
        std::uint64_t bytes = 0;
        for (const layer& one : problem_.layers()) {
            const aligned_tensor& tensor = models_->tensors()[one.tensor];
            for (std::size_t t = 0; t < one.grams.size(); ++t) {
                bytes += one.grams.size() > 1 ? tensor.tasks[t].bytes(tensor.size) : 0;
                bytes += (1 + panels(one)) * byte_count(one.grams[t].dtype, one.in * one.in);
            }
        }
        return bytes;
    }

    template <cpu_policy Policy>
    void write(const Policy& policy, const aligned_models& models, tensor_sink& out) const
    {
        // Everything else is averaged.
        std::pmr::vector<std::size_t> averaged(memory_of(policy));
        std::size_t next = 0;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            if (next < problem_.layers().size() && problem_.layers()[next].tensor == i) {
                ++next;
                continue;
            }
            const chunk_range range = chunks_of(models, i);
            for (std::size_t c = range.first; c < range.last; ++c) { averaged.push_back(c); }
        }
        auto tallies = detail::empty_tallies(averaged.size(), memory_of(policy));
        cpu_passes passes(policy, models);
        const method<average_options> average(passes, problem_.weights(), true);
        detail::merge_chunks<average_options>(passes, average, averaged, out, tallies, "average");

        // Small layers side by side, large ones alone.
        std::vector<const layer*> side_by_side, alone;
        std::size_t widest = 0;
        for (const layer& one : problem_.layers()) {
            const bool small_enough = one.in <= 1024;
            (small_enough ? side_by_side : alone).push_back(&one);
            if (small_enough) { widest = std::max(widest, one.in); }
        }
        detail::progress_meter meter(policy, "RegMean", problem_.layers().size(), progress_unit::layers);
        const auto done = [&] {
            if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
        };
        {
            const Policy quiet = sequential(policy);
            std::pmr::vector<system_memory> memory(memory_of(policy));
            const std::size_t workers = worker_count(policy, side_by_side.size());
            for (std::size_t w = 0; w < workers && widest > 0; ++w) {
                memory.emplace_back(widest, std::size_t{1}, memory_of(policy));
            }
            for_each_index(policy, side_by_side.size(), [&](std::size_t index, std::size_t worker) {
                solve(quiet, models, *side_by_side[index], memory[worker], out);
                done();
            });
        }
        for (const layer* one : alone) {
            Policy loud = policy;
            loud.progress = {};
            system_memory memory(one->in, worker_count(policy, panels(*one)), memory_of(policy));
            solve(loud, models, *one, memory, out);
            done();
        }
    }

private:
    static constexpr std::size_t panel = 256; // columns of W, and rows of G, in f64 at a time
    using layer = detail::gram_layer;

    /// Buffers for one layer: the system, and for each worker panels of W̄, Wt − W̄, their images, rows of G.
    struct system_memory {
        system_memory(std::size_t in, std::size_t workers, std::pmr::memory_resource* memory)
            : system(in * in, memory)
            , diagonals(in, memory)
            , panels(memory)
        {
            for (std::size_t w = 0; w < workers; ++w) { panels.emplace_back(in, memory); }
        }
        struct worker {
            worker(std::size_t in, std::pmr::memory_resource* memory)
                : mean(in * panel, memory)
                , deviation(in * panel, memory)
                , image(in * panel, memory)
                , rows(std::max(in * panel, 2 * detail::stored_gram::tile * detail::stored_gram::tile), memory)
                , raw(block_size, memory)
            { }
            std::pmr::vector<double> mean, deviation, image, rows, raw;
        };
        std::pmr::vector<double> system, diagonals;
        std::pmr::vector<worker> panels;
    };

    [[noreturn]] TASKVEC_COLD static void blame(std::string_view what, const double* values, std::size_t count,
        const std::function<std::uint64_t(std::size_t)>& index)
    {
        std::size_t i = 0;
        while (i + 1 < count && std::isfinite(values[i])) { ++i; }
        raise<nonfinite_error>(error_code::not_finite,
            message(what, " holds ", std::isnan(values[i]) ? "NaN" : "infinity", " at index ", index(i),
                ": repair it, or exclude the tensor"));
    }

    [[nodiscard]] static std::size_t panels(const layer& one) noexcept { return (one.out + panel - 1) / panel; }

    template <cpu_policy Policy>
    void solve(const Policy& policy, const aligned_models& models, const layer& one, system_memory& memory,
        tensor_sink& out) const
    {
        const matrix_view<double> system(memory.system.data(), one.in, one.in, matrix_order::column_major);
        assemble(policy, models, one, memory, system);
        double trace = 0;
        for (std::size_t i = 0; i < one.in; ++i) { trace += system(i, i); }
        const double lift = problem_.lift(one, trace);
        std::size_t unseen = one.in;
        for (std::size_t i = one.in; i-- > 0;) {
            system(i, i) += lift;
            if (system(i, i) == 0) { unseen = i; }
        }
        problem_.check_determined(one, models, factor_cholesky(policy, system), unseen);
        const matrix_view<const double> factor = system;
        for_each_index(policy, panels(one), [&](std::size_t index, std::size_t worker) {
            const std::size_t first = index * panel;
            merge_columns(
                policy, models, one, factor, first, std::min(panel, one.out - first), memory.panels[worker], out);
        });
    }

    /// system = Σ wt·G̃t (lower triangle), each Gram checked to be one.
    void assemble(const cpu& policy, const aligned_models& models, const layer& one, system_memory& memory,
        matrix_view<double> system) const
    {
        const std::size_t n = one.in;
        std::fill(memory.system.begin(), memory.system.begin() + static_cast<std::ptrdiff_t>(n * n), 0.0);
        const auto weights = problem_.weights();
        for (std::size_t t = 0; t < weights.size(); ++t) {
            const auto where = [&, t] { return problem_.where(one, t, models); };
            const detail::stored_gram gram(one.grams[t], n, where, memory.diagonals, memory.panels[0].raw.data());
            cpu bounded = n < 512 ? sequential(policy) : policy;
            bounded.threads =
                static_cast<unsigned>(std::min(worker_count(bounded, gram.tile_rows()), memory.panels.size()));
            for_each_index(bounded, gram.tile_rows(), [&](std::size_t tile_row, std::size_t worker) {
                auto& buffers = memory.panels[worker];
                gram.for_each_entry(
                    tile_row, buffers.rows.data(), buffers.raw.data(), [&](std::size_t i, std::size_t j, double value) {
                        system(i, j) += weights[t] * (i == j ? value : problem_.alpha() * value);
                    });
            });
        }
    }

    /// Wt of columns [first, first + count) of the in×out view.
    void load(const aligned_models& models, const layer& one, std::size_t t, std::size_t first, std::size_t count,
        double* out, std::pmr::vector<double>& raw) const
    {
        const aligned_tensor& tensor = models.tensors()[one.tensor];
        const bool whole = one.layout == weight_layout::out_in;
        const std::size_t runs = whole ? 1 : one.in, length = whole ? one.in * count : count;
        for (std::size_t run = 0; run < runs; ++run) {
            const std::uint64_t offset = whole ? first * one.in : run * one.out + first;
            const std::uint64_t largest =
                detail::stored_gram::read(tensor.tasks[t], offset, length, out + run * length, raw.data());
            if (largest >= exponent_mask<double> && models.options().on_nonfinite == nonfinite::error) {
                blame(message("tensor '", tensor.name, "' of ", models.label(t)), out + run * length, length,
                    [&](std::size_t i) { return offset + i; });
            }
        }
    }

    template <cpu_policy Policy>
    void merge_columns(const Policy& policy, const aligned_models& models, const layer& one,
        matrix_view<const double> factor, std::size_t first, std::size_t count, system_memory::worker& memory,
        tensor_sink& out) const
    {
        const Policy alone = sequential(policy);
        const auto weights = problem_.weights();
        const std::size_t n = one.in, size = n * count, tasks = weights.size();
        const bool whole = one.layout == weight_layout::out_in;
        const matrix_order order = whole ? matrix_order::column_major : matrix_order::row_major;
        const matrix_view<double> deviation(memory.deviation.data(), n, count, order),
            image(memory.image.data(), n, count, order);
        double *const mean = memory.mean.data(), *const change = memory.deviation.data(),
                      *const solved = memory.image.data();
        std::fill(mean, mean + size, 0.0);
        std::fill(solved, solved + size, 0.0);
        for (std::size_t t = 0; t < tasks; ++t) {
            load(models, one, t, first, count, change, memory.raw);
            kernels::accumulate(mean, change, weights[t] / problem_.total_weight(), size);
        }
        for (std::size_t t = 0; t < tasks; ++t) {
            if (tasks > 1) { load(models, one, t, first, count, change, memory.raw); }
            kernels::accumulate(change, mean, -1.0, size);
            for (std::size_t r = 0; r < n; r += panel) {
                const std::size_t height = std::min(panel, n - r);
                (void)detail::stored_gram::read(one.grams[t], r * n, height * n, memory.rows.data(), memory.raw.data());
                for (std::size_t i = 0; i < height; ++i) {
                    double* const row = memory.rows.data() + i * n;
                    const double kept = row[r + i];
                    for (std::size_t j = 0; j < n; ++j) { row[j] *= problem_.alpha(); }
                    row[r + i] = kept;
                }
                const matrix_view<const double> rows(memory.rows.data(), height, n, matrix_order::row_major);
                gemm(alone, weights[t], rows, deviation, 1.0, image.block(r, 0, height, count));
            }
        }
        solve_cholesky(alone, factor, image);
        kernels::accumulate(solved, mean, 1.0, size);

        const aligned_tensor& tensor = models.tensors()[one.tensor];
        detail::row_writer writer(out, false, memory_of(policy), detail::storage_conversions::of(storage_types{}));
        const std::size_t runs = whole ? 1 : n, length = whole ? size : count;
        for (std::size_t run = 0; run < runs; ++run) {
            const tensor_chunk piece{one.tensor, whole ? first * n : run * one.out + first, length};
            writer.open(tensor, piece);
            for (std::size_t at = 0; at < length; at += block_size) {
                writer.write(piece.offset + at, solved + run * length + at, std::min(block_size, length - at));
            }
            writer.close();
        }
    }

    const aligned_models* models_;
    detail::regmean_problem problem_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, regmean_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
