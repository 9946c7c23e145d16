// Other libraries' matrices and tensors, merged where they lie: Eigen's, DLPack's, and multidimensional spans.
// (xtensor.cpp has xtensor's.)
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/interop/dlpack.hpp>
#include <taskvec/interop/eigen.hpp>
#include <taskvec/interop/mdspan.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <Eigen/Core>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#if !defined(__cpp_lib_mdspan)
// A stand-in for std::mdspan, which g++ 12 lacks: its part of the interface that is asked for, in two dimensions.
namespace std_like {
struct layout_right { };
struct default_accessor { };
template <class T>
class mdspan {
public:
    using element_type = T;
    using reference = T&;
    using data_handle_type = T*;
    using layout_type = layout_right;
    using accessor_type = default_accessor;
    struct mapping_type {
        std::size_t span;
        [[nodiscard]] std::size_t required_span_size() const { return span; }
    };
    mdspan(T* data, std::size_t rows, std::size_t cols)
        : data_(data)
        , sides_{rows, cols}
    { }
    [[nodiscard]] static constexpr std::size_t rank() { return 2; }
    [[nodiscard]] T* data_handle() const { return data_; }
    [[nodiscard]] std::size_t extent(std::size_t i) const { return sides_[i]; }
    [[nodiscard]] std::size_t stride(std::size_t i) const { return i == 0 ? sides_[1] : 1; }
    [[nodiscard]] mapping_type mapping() const { return {sides_[0] * sides_[1]}; }
    [[nodiscard]] bool is_exhaustive() const { return true; }
    [[nodiscard]] bool is_strided() const { return true; }

private:
    T* data_;
    std::array<std::size_t, 2> sides_;
};
} // namespace std_like
using std_like::mdspan;
#else
using std::mdspan;
#endif

// DLPack's structures, as dlpack.h lays them out: a program has them from there, or from its framework.
struct DLDevice {
    std::int32_t device_type, device_id;
};
struct DLDataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};
struct DLPackVersion {
    std::uint32_t major, minor;
};
struct DLManagedTensorVersioned {
    DLPackVersion version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned*);
    std::uint64_t flags;
    DLTensor dl_tensor;
};

namespace {

const taskvec::cpu policy{.threads = 1};
const taskvec::task_arithmetic_options half{.lambda = 0.5};

template <class Numbers>
void print(const char* from, const Numbers& numbers)
{
    std::printf("%s:", from);
    for (const float number : numbers) { std::printf(" %g", number); }
    std::printf("\n");
}

// [eigen]
void merge_eigen()
{
    using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const matrix base = matrix::Zero(2, 3);
    const std::vector<matrix> tasks{matrix::Constant(2, 3, 2), matrix{{1, 2, 3}, {4, 5, 6}}};
    matrix merged(2, 3);
    taskvec::merge(policy, half, base, tasks, merged);
    print("Eigen", merged.reshaped<Eigen::RowMajor>());

    // Blocks of whole rows, maps and vectors as well; results come back as maps.
    taskvec::merge(policy, half, base.topRows(1), std::vector{taskvec::as_view(tasks[1].bottomRows(1))}, merged.row(0));
    print("a row of it", taskvec::as_eigen(taskvec::as_view(merged.row(0))));
}
// [end]

// [dlpack]
// `given` comes from a framework, such as a capsule of torch's __dlpack__; what goes back is one for it to take over.
DLManagedTensorVersioned* add_half(const taskvec::const_tensor_ref& base, DLManagedTensorVersioned* given)
{
    const taskvec::dlpack_handle task(given, "task"); // calls the deleter, whatever happens
    auto memory = std::make_shared<std::vector<float>>(base.size());
    const auto merged = taskvec::as_tensor(taskvec::as_view(*memory), base.shape);

    const taskvec::const_model_ref base_model{{"weight", base}}, task_model{{"weight", task.tensor()}};
    taskvec::merge(policy, half, base_model, std::vector{task_model}, taskvec::model_ref{{"weight", merged}});
    return taskvec::to_dlpack<DLManagedTensorVersioned>(merged, memory); // keeps the memory until it is given back
}
// [end]

// [mdspan]
void merge_spans(float* weights, const float* tuned, std::size_t rows, std::size_t cols)
{
    const mdspan live(weights, rows, cols);
    const mdspan task(tuned, rows, cols);
    taskvec::merge(policy, half, live, std::vector{taskvec::as_view(task)}, live); // in place
}
// [end]

} // namespace

int main()
{
    merge_eigen();

    std::vector<float> base(6, 1.0f), tuned{1, 2, 3, 4, 5, 6};
    const auto base_tensor = taskvec::as_tensor(taskvec::as_view(base), {2, 3});
    auto* const given =
        taskvec::to_dlpack<DLManagedTensorVersioned>(taskvec::as_tensor(taskvec::as_view(tuned), {2, 3}));
    const taskvec::dlpack_handle taken(add_half(base_tensor, given));
    print("DLPack", taskvec::flat_view<float>(taken.tensor(), "weight"));

    merge_spans(base.data(), tuned.data(), 2, 3);
    print("mdspan", base);
}
