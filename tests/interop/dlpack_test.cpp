// DLPack tensors: every field honoured, the deleter called exactly once, versions and read-only marks respected.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/policy.hpp>
#include <taskvec/interop/dlpack.hpp>

#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<dlpack/dlpack.h>)
#include <dlpack/dlpack.h>
#define TASKVEC_TEST_DLPACK 1
#endif

using namespace taskvec;

namespace abi {
// The structures as DLPack 1.x lays them out.
enum device_kind : std::int32_t { cpu = 1, cuda = 2, cuda_host = 3, opencl = 4, managed = 13 };
struct device_of {
    device_kind device_type;
    std::int32_t device_id;
};
struct data_type {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};
struct tensor {
    void* data;
    device_of device;
    std::int32_t ndim;
    data_type dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};
struct unversioned {
    tensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(unversioned*);
};
struct version_of {
    std::uint32_t major, minor;
};
struct versioned {
    version_of version;
    void* manager_ctx;
    void (*deleter)(versioned*);
    std::uint64_t flags;
    tensor dl_tensor;
};
static_assert(sizeof(tensor) == 48 && sizeof(unversioned) == 64 && sizeof(versioned) == 80);
} // namespace abi

namespace {
struct counted {
    int deleted = 0;
    std::vector<float> numbers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    std::vector<std::int64_t> shape{3, 4}, strides{4, 1};
};

template <class M>
M* produce(counted& source, std::uint32_t major = 1, std::uint64_t flags = 0)
{
    auto* made = new M{};
    auto& out = made->dl_tensor;
    out.data = source.numbers.data();
    out.device = {static_cast<decltype(out.device.device_type)>(1), 0};
    out.ndim = static_cast<std::int32_t>(source.shape.size());
    out.dtype = {2, 32, 1};
    out.shape = source.shape.data();
    out.strides = source.strides.data();
    made->manager_ctx = &source;
    made->deleter = [](M* self) {
        ++static_cast<counted*>(self->manager_ctx)->deleted;
        delete self;
    };
    if constexpr (dlpack_versioned<M>) {
        made->version = {major, 2};
        made->flags = flags;
    }
    return made;
}

template <class M, class Ref>
concept exportable = requires(const Ref& tensor) { to_dlpack<M>(tensor); };

template <class F>
std::string refusal(F&& f)
{
    try {
        f();
    }
    catch (const error& problem) {
        return problem.what();
    }
    return {};
}
} // namespace

#if defined(TASKVEC_TEST_DLPACK)
#define TASKVEC_TEST_MANAGED abi::unversioned, abi::versioned, DLManagedTensor
#else
#define TASKVEC_TEST_MANAGED abi::unversioned, abi::versioned
#endif

TEST_CASE_TEMPLATE(
    "a managed tensor is read and written in place, and given back exactly once", M, TASKVEC_TEST_MANAGED)
{
    counted source;
    {
        dlpack_handle<M> handle(produce<M>(source), "fc.weight");
        CHECK(handle);
        static_assert(!requires { std::move(handle).tensor(); } && !requires { std::move(handle).writable_tensor(); });
        CHECK(handle.tensor().data == source.numbers.data());
        CHECK(handle.tensor().shape == extents{3, 4});
        CHECK(handle.tensor().dtype == dtype::f32);
        CHECK(handle.tensor().space == memory_space::host);
        CHECK_FALSE(handle.read_only());
        CHECK(handle.template flat<const float>().size() == 12);
        handle.template flat<float>()[5] = -1;
        CHECK(source.numbers[5] == -1);
        CHECK_THROWS_AS((void)handle.template flat<double>(), dtype_mismatch);
        CHECK_THROWS_AS((void)(handle.template flat<float, memory_space::device>()), invalid_argument);

        dlpack_handle<M> moved(std::move(handle));
        CHECK_FALSE(handle);
        CHECK(handle.tensor().data == nullptr);
        CHECK(source.deleted == 0);
        handle = std::move(moved);
        CHECK(source.deleted == 0);
    }
    CHECK(source.deleted == 1);
}

TEST_CASE_TEMPLATE("reset gives back at once, release does not", M, TASKVEC_TEST_MANAGED)
{
    counted source;
    dlpack_handle<M> handle(produce<M>(source));
    handle.reset();
    CHECK(source.deleted == 1);
    handle.reset();
    CHECK(source.deleted == 1);

    dlpack_handle<M> other(produce<M>(source));
    M* released = other.release();
    CHECK_FALSE(other);
    CHECK(source.deleted == 1);
    released->deleter(released);
    CHECK(source.deleted == 2);

    // Assigning gives back what was there.
    dlpack_handle<M> first(produce<M>(source));
    first = dlpack_handle<M>(produce<M>(source));
    CHECK(source.deleted == 3);
    first.reset();
    CHECK(source.deleted == 4);

    // A deleter may be missing.
    M* plain = produce<M>(source);
    plain->deleter = nullptr;
    {
        dlpack_handle<M> borrowed(plain);
    }
    CHECK(source.deleted == 4);
    delete plain;
}

TEST_CASE_TEMPLATE("a refused tensor is given back exactly once too", M, TASKVEC_TEST_MANAGED)
{
    counted source;
    auto* strange = produce<M>(source);
    strange->dl_tensor.dtype = {2, 32, 4};
    CHECK(refusal([&] { dlpack_handle<M> handle(strange, "fc.weight"); })
        == "tensor 'fc.weight' has DLPack type code 2 with 32 bits and 4 lanes; expected one lane of a type that "
           "safetensors has a name for: convert it first");
    CHECK(source.deleted == 1);
    CHECK_THROWS_AS(dlpack_handle<M>(nullptr), invalid_argument);
}

TEST_CASE("another major version is given back unread")
{
    counted source;
    auto* future = produce<abi::versioned>(source, 2);
    future->dl_tensor.ndim = 1 << 20; // would crash if it were read
    future->dl_tensor.shape = reinterpret_cast<std::int64_t*>(8);
    CHECK(refusal([&] { dlpack_handle<abi::versioned> handle(future, "w"); })
        == "tensor 'w' comes as DLPack 2.2; expected major version 1: ask its framework for that version");
    CHECK(source.deleted == 1);
}

TEST_CASE("read-only tensors are read and not written")
{
    counted source;
    dlpack_handle<abi::versioned> handle(produce<abi::versioned>(source, 1, 1), "w");
    CHECK(handle.read_only());
    CHECK(handle.flat<const float>()[2] == 2);
    CHECK(refusal([&] { (void)handle.flat<float>(); }) == "tensor 'w' is read-only: copy it before writing");
    CHECK_THROWS_AS((void)handle.writable_tensor(), invalid_argument);
    // Another flag (the producer made a copy) forbids nothing.
    dlpack_handle<abi::versioned> copied(produce<abi::versioned>(source, 1, 2));
    CHECK(copied.writable_tensor().data == source.numbers.data());
}

TEST_CASE("null strides, other strides and byte offsets are honoured")
{
    counted source;
    std::unique_ptr<abi::unversioned> managed(produce<abi::unversioned>(source));
    abi::tensor& tensor = managed->dl_tensor;
    tensor.strides = nullptr;
    CHECK(from_dlpack(tensor).strides.empty());
    CHECK(from_dlpack(tensor).contiguous());

    std::int64_t shape[] = {2, 4};
    tensor.shape = shape;
    tensor.byte_offset = 16;
    CHECK(from_dlpack(tensor).data == source.numbers.data() + 4);
    CHECK((flat_view<float>(from_dlpack(tensor), "w"))[0] == 4);

    std::int64_t transposed[] = {1, 2};
    tensor.strides = transposed;
    CHECK(from_dlpack(tensor).strides == extents{1, 2});
    CHECK(refusal([&] { (void)flat_view<float>(from_dlpack(tensor, "w"), "w"); })
        == "tensor 'w' is not contiguous; copy it to row-major memory first");

    tensor.byte_offset = 2;
    CHECK(refusal([&] { (void)from_dlpack(tensor, "w"); })
        == "tensor 'w' is not aligned to its 4-byte elements: copy it first");

    tensor.byte_offset = 0;
    tensor.ndim = 0;
    tensor.shape = nullptr;
    tensor.strides = nullptr;
    CHECK(from_dlpack(tensor).size() == 1);
}

TEST_CASE("devices")
{
    counted source;
    std::unique_ptr<abi::unversioned> managed(produce<abi::unversioned>(source));
    abi::tensor& tensor = managed->dl_tensor;
    tensor.device = {abi::cuda, 3};
    CHECK(from_dlpack(tensor).space == memory_space::device);
    CHECK(from_dlpack(tensor).device == 3);
    tensor.device = {abi::managed, 0};
    CHECK(from_dlpack(tensor).space == memory_space::device);
    tensor.device = {abi::cuda_host, 1};
    CHECK(from_dlpack(tensor).space == memory_space::host);
    tensor.device = {abi::opencl, 0};
    CHECK(refusal([&] { (void)from_dlpack(tensor, "w"); })
        == "tensor 'w' lives on a device of DLPack type 4; expected the CPU (1), CUDA (2), pinned (3) or managed CUDA "
           "memory (13): copy it to one of these "
           "first");
}

TEST_CASE("malformed tensors are refused")
{
    counted source;
    std::unique_ptr<abi::unversioned> managed(produce<abi::unversioned>(source));
    abi::tensor tensor = managed->dl_tensor;
    tensor.data = nullptr;
    CHECK(refusal([&] { (void)from_dlpack(tensor, "w"); }) == "tensor 'w' of shape [3, 4] has no data");
    std::int64_t empty[] = {0, 4};
    tensor.shape = empty;
    CHECK(from_dlpack(tensor).size() == 0);
    std::int64_t negative[] = {-3, 4};
    tensor.shape = negative;
    CHECK_THROWS_AS((void)from_dlpack(tensor), shape_mismatch);
    std::int64_t huge[] = {std::int64_t{1} << 62, 4};
    tensor.shape = huge;
    CHECK_THROWS_AS((void)from_dlpack(tensor), shape_mismatch);
    tensor.shape = nullptr;
    CHECK_THROWS_AS((void)from_dlpack(tensor), invalid_argument);
    tensor.ndim = -1;
    CHECK_THROWS_AS((void)from_dlpack(tensor), invalid_argument);
}

TEST_CASE_TEMPLATE("tensor references go out and come back, with strides always given", M, TASKVEC_TEST_MANAGED)
{
    for (const auto type : {dtype::f64, dtype::f32, dtype::bf16, dtype::f16, dtype::i64, dtype::u8, dtype::boolean,
             dtype::c64, dtype::f8_e4m3}) {
        auto memory = std::make_shared<std::vector<double>>(12);
        std::weak_ptr<std::vector<double>> alive = memory;
        const tensor_ref sent{.data = memory->data(), .dtype = type, .shape = {3, 4}};
        M* managed = to_dlpack<M>(sent, memory);
        memory.reset();
        CHECK_FALSE(alive.expired());
        REQUIRE(managed->dl_tensor.strides != nullptr);
        CHECK(managed->dl_tensor.strides[0] == 4);
        CHECK(managed->dl_tensor.strides[1] == 1);
        {
            dlpack_handle<M> handle(managed);
            CHECK(handle.tensor().dtype == type);
            CHECK(handle.tensor().data == sent.data);
            CHECK(handle.tensor().shape == sent.shape);
            CHECK(handle.tensor().contiguous());
            CHECK_FALSE(handle.read_only());
        }
        CHECK(alive.expired());
    }
    const tensor_ref device{
        .data = nullptr, .dtype = dtype::f32, .shape = {0, 2}, .space = memory_space::device, .device = 1};
    dlpack_handle<M> handle(to_dlpack<M>(device));
    CHECK(handle.tensor().space == memory_space::device);
    CHECK(handle.tensor().device == 1);
    CHECK_THROWS_AS((void)to_dlpack<M>(tensor_ref{.dtype = dtype::f4, .shape = {2}}), dtype_mismatch);
    CHECK_THROWS_AS(
        (void)to_dlpack<M>(tensor_ref{.dtype = dtype::f32, .shape = {2}, .strides = {1, 1}}), shape_mismatch);
}

TEST_CASE("a const tensor goes out read-only, and only where that can be said")
{
    const std::vector<float> numbers{1, 2, 3};
    dlpack_handle<abi::versioned> handle(to_dlpack<abi::versioned>(as_tensor(as_view(numbers))));
    CHECK(handle.read_only());
    CHECK(handle.flat<const float>()[1] == 2);
    static_assert(exportable<abi::versioned, const_tensor_ref> && exportable<abi::versioned, tensor_ref>
        && exportable<abi::unversioned, tensor_ref>);
    static_assert(!exportable<abi::unversioned, const_tensor_ref>);
}
