// RegMean on taskvec::gpu. The Gram matrices are in the same memory as the models.
// SPDX-License-Identifier: Apache-2.0
//
// The linear algebra is that of device/cusolver (link CUDA::cublas and CUDA::cusolver), or Eigen's on a Thrust host
// system. This header is not part of <taskvec/device/methods.hpp>, which needs no libraries. All of it is f64, in
// another order of operations than the CPU's: merged layers agree with the CPU's to about 1e-15 times the condition
// number of their system before they are rounded, all other tensors bit for bit.
#pragma once

#include <taskvec/device/linalg/backend.hpp>
#include <taskvec/device/linalg/matrix.hpp>
#include <taskvec/device/methods/gram_functors.hpp>
#include <taskvec/device/methods/merge.hpp>
#include <taskvec/methods/regmean.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Memory: an n×n system and an n×n Gram matrix in f64, and three panels of n rows, of as many outputs as
/// device_models::spare() holds, 256 at least. Each Gram is read once for the system and again for each panel. Waits
/// for each layer.
template <>
class device_method<regmean_options> {
public:
    device_method(device_models& models, const regmean_options& options)
        : problem_(models.models(), options, models.space())
        , spare_(models.spare())
    { }

    void write(device_models& models, merge_report&) const
    {
        device_passes passes(models);
        const method<average_options> prepared(passes, problem_.weights(), true);
        detail::device_walk<average_options> average(passes, prepared);
        std::size_t next = 0; // the first tensor that is not written
        for (const detail::gram_layer& one : problem_.layers()) {
            average.write({next, one.tensor});
            next = one.tensor + 1;
        }
        average.write({next, models.models().tensors().size()});
        with_context(models.policy(), [&](const gpu& policy) {
            for (const detail::gram_layer& one : problem_.layers()) { solve(policy, models, one); }
        });
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    /// As on the CPU, panel by panel.
    [[nodiscard]] std::uint64_t bytes_beside(const device_models& models) const noexcept
    {
        std::uint64_t bytes = 0;
        for (const detail::gram_layer& one : problem_.layers()) {
            const aligned_tensor& tensor = models.models().tensors()[one.tensor];
            const std::uint64_t panels = (one.out + panel(one) - 1) / panel(one);
            for (std::size_t t = 0; t < one.grams.size(); ++t) {
                bytes += byte_count(tensor.tasks[t].dtype, tensor.size)
                    + (1 + panels) * byte_count(one.grams[t].dtype, one.in * one.in);
            }
        }
        return bytes;
    }

private:
    using counter = elementwise::counter;

    /// Brings runs of operands to the device where they are on the host.
    class staging {
    public:
        staging(const gpu& policy, memory_space space)
            : policy_(policy)
            , space_(space)
        { }
        /// An operand in device memory whose element 0 is element `first` of `from`, and of which `count` are there.
        /// The next call takes its place.
        [[nodiscard]] aligned_tensor::operand bring(
            const aligned_tensor::operand& from, std::uint64_t first, std::uint64_t count)
        {
            const std::byte* const data = from.data + byte_count(from.dtype, first);
            if (space_ == memory_space::device) { return {data, from.dtype}; }
            const std::size_t bytes = byte_count(from.dtype, count);
            if (memory_.size() < bytes) { memory_ = device::buffer<std::byte>(policy_, bytes); }
            device::upload(policy_, memory_.data(), data, bytes);
            return {memory_.data(), from.dtype};
        }

    private:
        gpu policy_;
        memory_space space_;
        device::buffer<std::byte> memory_;
    };

    /// Outputs of a layer that are merged together.
    [[nodiscard]] std::size_t panel(const detail::gram_layer& one) const noexcept
    {
        return std::clamp<std::size_t>(
            spare_ / (3 * sizeof(double) * one.in), 256, std::max<std::size_t>(one.out, 256));
    }

    void solve(const gpu& policy, device_models& models, const detail::gram_layer& one) const
    {
        staging stage(policy, models.space());
        device_matrix<double> system(policy, one.in, one.in);
        assemble(policy, models, one, stage, system);
        const std::size_t columns = std::min(panel(one), one.out);
        device::buffer<double> mean(policy, one.in * columns), deviation(policy, one.in * columns),
            image(policy, one.in * columns);
        device_matrix<double> gram(policy, one.in, one.in, matrix_order::row_major);
        for (std::size_t first = 0; first < one.out; first += columns) {
            merge_columns(policy, models, one, stage, system.view(), first, std::min(columns, one.out - first),
                {mean, deviation, image}, gram);
        }
    }

    /// system = the Cholesky factor of Σ wt·G̃t + lift, each Gram checked to be one.
    void assemble(const gpu& policy, device_models& models, const detail::gram_layer& one, staging& stage,
        device_matrix<double>& system) const
    {
        const std::size_t n = one.in;
        const device::buffer<double> diagonal(policy, n);
        for (std::size_t t = 0; t < one.grams.size(); ++t) {
            const aligned_tensor::operand gram = stage.bring(one.grams[t], 0, n * n);
            device::sweep(policy, n, elementwise::read_diagonal{gram, n, diagonal.data()});
            const std::vector<double> squares = diagonal.download();
            for (std::size_t i = 0; i < n; ++i) {
                if (!std::isfinite(squares[i])) {
                    detail::refuse_gram_nonfinite(problem_.where(one, t, models.models()), squares[i], i * n + i);
                }
                if (squares[i] < 0) {
                    detail::refuse_gram_negative(problem_.where(one, t, models.models()), squares[i], i);
                }
            }
            const double tolerance = detail::gram_tolerance(gram.dtype);
            const device::buffer<counter> wrong(policy, std::vector{device_models::none});
            device::sweep(policy, n * n,
                elementwise::add_gram{gram, n, diagonal.data(), tolerance, problem_.weights()[t], problem_.alpha(),
                    system.data(), wrong.data()});
            if (const counter k = wrong.download()[0]; k != device_models::none) {
                const std::size_t i = k / n, j = k % n;
                const double tolerated = tolerance * std::sqrt(squares[i]) * std::sqrt(squares[j]);
                detail::refuse_gram_entry(problem_.where(one, t, models.models()), n, i, j, element(policy, gram, k),
                    element(policy, gram, j * n + i), tolerated);
            }
        }
        device::sweep(policy, n,
            elementwise::read_diagonal{
                {reinterpret_cast<const std::byte*>(system.data()), dtype::f64}, n, diagonal.data()});
        const std::vector<double> squares = diagonal.download();
        double trace = 0;
        for (const double square : squares) { trace += square; }
        const double lift = problem_.lift(one, trace);
        const auto unseen =
            std::find_if(squares.begin(), squares.end(), [&](double square) { return square + lift == 0; });
        device::sweep(policy, n, elementwise::lift_diagonal{system.data(), n, lift});
        problem_.check_determined(one, models.models(), factor_cholesky<double>(policy, system.view()),
            static_cast<std::size_t>(unseen - squares.begin()));
    }
    [[nodiscard]] static double element(const gpu& policy, const aligned_tensor::operand& from, std::size_t i)
    {
        const std::size_t width = bits_per_element(from.dtype) / 8;
        alignas(8) std::byte word[8];
        device::download(policy, word, from.data + i * width, width);
        return elementwise::load<double>({word, from.dtype}, 0);
    }

    struct panel_memory {
        device::buffer<double>&mean, &deviation, &image;
    };

    /// Outputs [first, first + count) of a layer: W̄ + (Σ wt·G̃t)⁻¹ Σ wt·G̃t·(Wt − W̄).
    void merge_columns(const gpu& policy, device_models& models, const detail::gram_layer& one, staging& stage,
        device_matrix_view<const double> factor, std::size_t first, std::size_t count, const panel_memory& memory,
        device_matrix<double>& gram) const
    {
        const std::size_t n = one.in, size = n * count;
        const bool whole = one.layout == weight_layout::out_in; // then a column of the in×out view is a run of memory
        const matrix_order order = whole ? matrix_order::column_major : matrix_order::row_major;
        const std::uint64_t begin = whole ? first * n : first, extent = whole ? size : (n - 1) * one.out + count;
        const elementwise::strided_runs runs =
            whole ? elementwise::strided_runs{0, size, size} : elementwise::strided_runs{0, count, one.out};
        const aligned_tensor& tensor = models.models().tensors()[one.tensor];
        const auto weights = problem_.weights();
        const device_matrix_view<double> deviation(memory.deviation.data(), n, count, order),
            image(memory.image.data(), n, count, order);
        memory.mean.clear();
        memory.image.clear();
        for (std::size_t t = 0; t < weights.size(); ++t) {
            const aligned_tensor::operand from = stage.bring(tensor.tasks[t], begin, extent);
            device::sweep(policy, size,
                elementwise::add_weighted{from, runs, tensor.position + begin, weights[t] / problem_.total_weight(),
                    memory.mean.data(), models.nonfinite_flag()});
        }
        for (std::size_t t = 0; t < weights.size(); ++t) {
            device::sweep(policy, size,
                elementwise::deviate{
                    stage.bring(tensor.tasks[t], begin, extent), runs, memory.mean.data(), deviation.data()});
            device::sweep(policy, n * n,
                elementwise::shrunk_gram{stage.bring(one.grams[t], 0, n * n), n, problem_.alpha(), gram.data()});
            gemm<double>(policy, weights[t], std::as_const(gram).view(), deviation, 1.0, image);
        }
        solve_cholesky<double>(policy, factor, image);
        models.store(one.tensor, {begin, runs.length, runs.stride}, size, memory.image.data(), memory.mean.data());
    }

    detail::regmean_problem problem_;
    std::size_t spare_;
};

} // namespace taskvec::inline TASKVEC_ABI
