// How rows of an arithmetic type come from stored elements, and go back: one function for each dtype.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/kernels.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// An 8-bit float by its bits.
[[nodiscard]] inline float fp8_value(dtype type, unsigned code) noexcept
{
    return type == dtype::f8_e5m2 ? e5m2_to_f32(static_cast<std::uint8_t>(code))
                                  : e4m3_to_f32(static_cast<std::uint8_t>(code));
}

/// The conversions of one dtype. `from` and `to` are aligned to its elements.
template <arithmetic_element A>
struct row_conversion {
    bits_type<A> (*widen)(const void* from, A* out, std::size_t n) = nullptr; ///< kernels::widen
    bits_type<A> (*subtract)(const void* from, const A* base, A* out, std::size_t n) = nullptr; ///< kernels::subtract
    void (*narrow)(const A* from, void* to, std::size_t n) = nullptr; ///< kernels::narrow
};

template <arithmetic_element A, storage_element T>
[[nodiscard]] constexpr row_conversion<A> conversion_of() noexcept
{
    return {[](const void* from, A* out, std::size_t n) { return kernels::widen(static_cast<const T*>(from), out, n); },
        [](const void* from, const A* base, A* out, std::size_t n) {
            return kernels::subtract(static_cast<const T*>(from), base, out, n);
        },
        [](const A* from, void* to, std::size_t n) { kernels::narrow(from, static_cast<T*>(to), n); }};
}

/// 8-bit floats are read, as f32, and not written.
template <arithmetic_element A, dtype type>
[[nodiscard]] constexpr row_conversion<A> fp8_conversion() noexcept
{
    return {[](const void* from, A* out, std::size_t n) {
                for (std::size_t i = 0; i < n; ++i) {
                    out[i] = static_cast<A>(fp8_value(type, static_cast<const unsigned char*>(from)[i]));
                }
                return kernels::largest_magnitude(out, n);
            },
        [](const void* from, const A* base, A* out, std::size_t n) {
            for (std::size_t i = 0; i < n; ++i) {
                out[i] = static_cast<A>(fp8_value(type, static_cast<const unsigned char*>(from)[i])) - base[i];
            }
            return kernels::largest_magnitude(out, n);
        },
        nullptr};
}

/// The conversions between rows of A and every dtype that may be met.
template <arithmetic_element A>
class row_conversions {
public:
    template <storage_element... T>
    constexpr explicit row_conversions(storage_list<T...>) noexcept
    {
        table_[static_cast<std::size_t>(dtype::f8_e4m3)] = fp8_conversion<A, dtype::f8_e4m3>();
        table_[static_cast<std::size_t>(dtype::f8_e5m2)] = fp8_conversion<A, dtype::f8_e5m2>();
        ((table_[static_cast<std::size_t>(dtype_of<T>)] = conversion_of<A, T>()), ...); // also what is fp8
    }
    /// Those of a dtype; dtype_mismatch for a tensor that nothing can be computed with.
    [[nodiscard]] const row_conversion<A>& of(dtype type, std::string_view tensor, bool written = false) const
    {
        const row_conversion<A>& found = table_[static_cast<std::size_t>(type)];
        if (written ? !found.narrow : !found.widen) { refuse_storage(type, tensor); }
        return found;
    }

private:
    std::array<row_conversion<A>, std::size(dtype_table)> table_{};
};

template <arithmetic_element A, class Types>
inline constexpr row_conversions<A> conversions_between{Types{}};

/// The conversions of both arithmetic types, those that a list of storage types needs.
struct storage_conversions {
    const row_conversions<float>* single = nullptr;
    const row_conversions<double>* wide = nullptr;

    template <class... T>
    [[nodiscard]] static constexpr storage_conversions of(storage_list<T...> types) noexcept
    {
        storage_conversions all;
        if constexpr ((std::same_as<arithmetic_type<T>, float> || ...)) {
            all.single = &conversions_between<float, decltype(types)>;
        }
        if constexpr ((std::same_as<arithmetic_type<T>, double> || ...)) {
            all.wide = &conversions_between<double, decltype(types)>;
        }
        return all;
    }
    template <arithmetic_element A>
    [[nodiscard]] const row_conversions<A>& get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return *wide; }
        else {
            return *single;
        }
    }
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
