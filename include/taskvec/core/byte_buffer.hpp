// Bytes for elements whose type is known when a program runs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstddef>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Zeroed bytes of a resource, aligned for elements of any storage type: a vector of bytes asks its resource for no
/// alignment, and one that packs what it gives (std::pmr::monotonic_buffer_resource) then gives none.
class byte_buffer {
public:
    explicit byte_buffer(std::pmr::memory_resource* memory, std::size_t size = 0)
        : units_(units_of(size), memory)
        , size_(size)
    { }

    [[nodiscard]] std::byte* data() noexcept { return reinterpret_cast<std::byte*>(units_.data()); }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    void resize(std::size_t size)
    {
        units_.resize(units_of(size));
        size_ = size;
    }

private:
    struct alignas(std::max_align_t) unit {
        std::byte bytes[alignof(std::max_align_t)];
    };
    [[nodiscard]] static std::size_t units_of(std::size_t size) noexcept
    {
        return size / sizeof(unit) + (size % sizeof(unit) == 0 ? 0 : 1);
    }

    std::pmr::vector<unit> units_;
    std::size_t size_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
