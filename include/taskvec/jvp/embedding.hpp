// Table lookup with tangents, and its vjp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/loss.hpp>

#include <cstddef>
#include <ranges>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Row i of the result is row indices[i] of the table; table is entries × features, the result is n × features.
/// Throws invalid_argument for an index out of range. A copy of n rows, twice that where the table has a tangent.
///
///     auto x = embedding(p["tokens.weight"], ids);
template <operand Table, index_range Indices>
[[nodiscard]] operation_result<Table> embedding(const Table& table, const Indices& indices);

/// vjp of embedding: dy is n × features; returns entries × features, rows that repeat added up in order.
template <class G, index_range Indices>
    requires matching_operands<G>
[[nodiscard]] row_matrix<operand_scalar<G>> embedding_vjp(const G& dy, const Indices& indices, Eigen::Index entries);

namespace detail {
template <class Indices>
void check_indices(std::string_view name, const Indices& indices, Eigen::Index entries)
{
    std::size_t place = 0;
    for (const auto index : indices) {
        if (!std::in_range<Eigen::Index>(index) || static_cast<Eigen::Index>(index) < 0
            || static_cast<Eigen::Index>(index) >= entries) {
            raise<invalid_argument>(error_code::index_out_of_range,
                message(
                    "operation '", name, "': index ", index, " at place ", place, " is outside [0, ", entries, ")"));
        }
        ++place;
    }
}
} // namespace detail

template <operand Table, index_range Indices>
operation_result<Table> embedding(const Table& table, const Indices& indices)
{
    using T = operand_scalar<Table>;
    decltype(auto) rows = detail::as_primal_tangent(table);
    detail::check_indices("embedding", indices, rows.rows());
    auto y = primal_tangent<T>::uninitialized(
        static_cast<Eigen::Index>(std::ranges::size(indices)), rows.cols(), rows.active());
    Eigen::Index row = 0;
    for (const auto index : indices) {
        y.mutable_primal().row(row) = rows.primal().row(static_cast<Eigen::Index>(index));
        if (rows.active()) { y.mutable_tangent().row(row) = rows.tangent().row(static_cast<Eigen::Index>(index)); }
        ++row;
    }
    detail::check_tangent(y, "embedding");
    return detail::finish<operation_result<Table>>(std::move(y));
}

template <class G, index_range Indices>
    requires matching_operands<G>
row_matrix<operand_scalar<G>> embedding_vjp(const G& dy, const Indices& indices, Eigen::Index entries)
{
    using T = operand_scalar<G>;
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    detail::check_equal("embedding_vjp", "the number of indices", static_cast<Eigen::Index>(std::ranges::size(indices)),
        cotangent.rows());
    detail::check_indices("embedding_vjp", indices, entries);
    row_matrix<T> gradient = row_matrix<T>::Zero(entries, cotangent.cols());
    Eigen::Index row = 0;
    for (const auto index : indices) {
        gradient.row(static_cast<Eigen::Index>(index)) += cotangent.primal().row(row++);
    }
    return gradient;
}

} // namespace taskvec::inline TASKVEC_ABI
