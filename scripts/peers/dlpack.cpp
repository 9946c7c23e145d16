// What tool_dlpack.py loads: tensors of other frameworks are taken over as DLPack hands them out, merged, and handed
// on. SPDX-License-Identifier: Apache-2.0
#include <taskvec/interop/dlpack.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace {

// As dlpack.h lays them out.
struct device {
    std::int32_t device_type, device_id;
};
struct data_type {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct tensor {
    void* data;
    ::device device;
    std::int32_t ndim;
    data_type dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};
struct legacy {
    tensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(legacy*);
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

std::string message;

// base + ½·Σ (task − base), of the base's dtype, shape and kind. Null where something is refused: see message.
template <class M>
M* merged(M* base, M** tasks, std::size_t count)
{
    try {
        std::vector<taskvec::dlpack_handle<M>> owners;
        owners.emplace_back(base, "base");
        for (std::size_t t = 0; t < count; ++t) { owners.emplace_back(tasks[t], "task " + std::to_string(t + 1)); }
        const taskvec::const_tensor_ref from = owners[0].tensor();
        std::vector<taskvec::const_model_ref> models;
        for (std::size_t t = 0; t < count; ++t) { models.push_back({{"weight", owners[t + 1].tensor()}}); }
        auto memory = std::make_shared<std::vector<std::byte>>(from.bytes());
        const taskvec::tensor_ref out{memory->data(), from.dtype, from.shape};
        taskvec::merge(taskvec::cpu{}, taskvec::task_arithmetic_options{.lambda = 0.5},
            taskvec::const_model_ref{{"weight", from}}, models, taskvec::model_ref{{"weight", out}});
        return taskvec::to_dlpack<M>(out, memory);
    }
    catch (const std::exception& error) {
        message = error.what();
        return nullptr;
    }
}

} // namespace

extern "C" {
const char* last_message()
{
    return message.c_str();
}
legacy* merge_legacy(legacy* base, legacy** tasks, std::size_t count)
{
    return merged(base, tasks, count);
}
versioned* merge_versioned(versioned* base, versioned** tasks, std::size_t count)
{
    return merged(base, tasks, count);
}
}
