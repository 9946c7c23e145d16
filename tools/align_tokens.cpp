// Adapters to merge: rows of tokens.
// SPDX-License-Identifier: Apache-2.0
#include "align_adapters.hpp"
#include "token_rows.hpp"
#include "tokenizers.hpp"
#include "vocabulary.hpp"

#include <taskvec/core/matrix.hpp>
#include <taskvec/core/storage.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

namespace tool {

namespace {

/// An adapter whose factors, or whole tensors, have rows of tokens.
template <class T>
struct token_rows {
    taskvec::peft_adapter<T>* adapter;
    vocabulary_input input;
    taskvec::const_model_ref shapes; ///< of its weights, without data
    std::optional<std::int64_t> count; ///< of rows; nothing: its tensors do not agree
};

/// The weight that a tensor beside factors is, or is a copy of.
std::string weight_of(const std::string& name)
{
    if (!name.ends_with(taskvec::peft_base_weight)) { return name; }
    return name.substr(0, name.size() - taskvec::peft_base_weight.size()) + ".weight";
}

/// Adapters that have something with a row for each token; each has then all that some have.
template <class T>
std::vector<token_rows<T>> adapters_with_tokens(adapter_group<T>& group)
{
    const auto& given = group.given;
    std::vector<token_rows<T>> members;
    std::map<std::string, taskvec::extents> all; // what has rows of tokens
    const auto add = [&](taskvec::peft_adapter<T>& adapter, const fs::path& path) {
        token_rows<T> member{&adapter, {path, in_quotes(path), nullptr}, {}, {}};
        bool any = false, same = true;
        const auto insert = [&](const std::string& name, const taskvec::extents& shape) {
            if (member.shapes.find(name)) { return; }
            member.shapes.insert(name, {nullptr, taskvec::dtype::f32, shape, {}});
            if (!has_rows_of_tokens(name) || shape.empty()) { return; }
            all.emplace(name, shape);
            same = same && (!any || *member.count == shape[0]);
            any = true;
            member.count = shape[0];
        };
        for (const auto& [module, update] : adapter.updates) {
            const bool embedding = adapter.embeddings.contains(module);
            insert(module + ".weight",
                {static_cast<std::int64_t>(embedding ? update.in() : update.out()),
                    static_cast<std::int64_t>(embedding ? update.out() : update.in())});
        }
        // The first one's are taken as they are, unless rows are asked to be lined up.
        const bool as_they_are = given.modules_to_save == "first" && given.vocabulary == "error";
        for (const auto& [name, tensor] : adapter.others) {
            if (!as_they_are && has_rows_of_tokens(weight_of(name))) { insert(weight_of(name), tensor.shape); }
        }
        if (!any) { return; }
        if (!same) { member.count.reset(); }
        members.push_back(std::move(member));
    };
    if (given.in_phi()) { add(group.initial, given.init); }
    for (std::size_t i = 0; i < group.adapters.size(); ++i) { add(group.adapters[i], group.paths[i]); }
    for (auto& member : members) {
        for (const auto& [name, shape] : all) {
            if (member.shapes.find(name) || !member.count) { continue; }
            auto own = shape;
            own[0] = *member.count;
            member.shapes.insert(name, {nullptr, taskvec::dtype::f32, own, {}});
        }
    }
    for (auto& member : members) { member.input.model = &member.shapes; }
    return members;
}

/// Which row of an adapter each row of the result is.
using rows_of_tokens = std::vector<std::optional<std::uint64_t>>;

/// A row that stands, alone or with others, for one of the result, and its share in that.
struct row_source {
    std::size_t adapter;
    std::uint64_t row;
    double share;
};

/// What stands for row i of the result in adapter m: its own row; where it has none the first one's, or, where that
/// has none, the mean of those that have it.
template <class May>
std::vector<row_source> sources_of(
    const std::vector<rows_of_tokens>& rows, std::size_t m, std::size_t i, const May& may)
{
    const auto has = [&](std::size_t other) { return may(other) && i < rows[other].size() && rows[other][i]; };
    for (const auto one : {m, std::size_t{0}}) {
        if (has(one)) { return {{one, *rows[one][i], 1}}; }
    }
    std::vector<row_source> sources;
    for (std::size_t other = 1; other < rows.size(); ++other) {
        if (has(other)) { sources.push_back({other, *rows[other][i], 1}); }
    }
    for (auto& one : sources) { one.share /= static_cast<double>(sources.size()); }
    return sources;
}

/// The factor that has a row, or a column, for each token.
template <class T>
void line_up_factors(
    std::vector<token_rows<T>>& members, const std::vector<rows_of_tokens>& rows, const std::string& name, bool in_phi)
{
    const auto module = name.substr(0, name.rfind('.'));
    std::vector<taskvec::matrix<T>> before(members.size()); // tokens×rank
    for (std::size_t m = 0; m < members.size(); ++m) {
        const auto place = members[m].adapter->updates.find(module);
        if (place == members[m].adapter->updates.end() || name != module + ".weight") { continue; }
        const bool embedding = members[m].adapter->embeddings.contains(module);
        before[m] = embedding ? taskvec::transposed_copy(place->second.a) : place->second.b;
    }
    for (std::size_t m = 0; m < members.size(); ++m) {
        if (before[m].empty()) { continue; }
        const std::size_t rank = before[m].cols();
        taskvec::matrix<T> after(rows[m].size(), rank, taskvec::matrix_order::row_major); // zeros
        for (std::size_t i = 0; i < rows[m].size(); ++i) {
            // In phi space a row that is lacking is the initialisation's.
            const auto sources = sources_of(
                rows, m, i, [&](std::size_t other) { return other == m || (in_phi && before[other].cols() == rank); });
            for (const auto& one : sources) {
                const T* const row = &before[one.adapter](static_cast<std::size_t>(one.row), 0);
                for (std::size_t k = 0; k < rank; ++k) {
                    after(i, k) = sources.size() == 1 ? row[k] : after(i, k) + static_cast<T>(one.share) * row[k];
                }
            }
        }
        auto& update = members[m].adapter->updates.at(module);
        if (members[m].adapter->embeddings.contains(module)) { update.a = taskvec::transposed_copy(after); }
        else {
            update.b = std::move(after);
        }
    }
}

/// Adds `share` times elements of a tensor, from `first` on, to `sum`.
void add_row(const taskvec::peft_tensor& from, const std::string& name, std::uint64_t first, double share,
    std::vector<double>& sum)
{
    taskvec::visit_storage(from.dtype, name, [&]<class S>(std::type_identity<S>) {
        for (std::size_t k = 0; k < sum.size(); ++k) {
            S value;
            std::memcpy(&value, from.bytes.data() + (static_cast<std::size_t>(first) + k) * sizeof(S), sizeof(S));
            sum[k] += share * static_cast<double>(taskvec::widen<taskvec::arithmetic_type<S>>(value));
        }
    });
}

[[noreturn]] void refuse_lacking_rows(const std::string& name, std::size_t row, const std::string& label)
{
    taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::adapter_shape,
        taskvec::message("tensor '", name, "' of '", label, "' has no row for token ", row,
            " of the result, nor has another adapter's: use another rule (--vocabulary base or truncate), or leave "
            "whole tensors out (--modules-to-save drop)"));
}

/// A tensor that some adapters carry whole.
template <class T>
void line_up_whole(
    std::vector<token_rows<T>>& members, const std::vector<rows_of_tokens>& rows, const std::string& name)
{
    std::vector<const taskvec::peft_tensor*> before(members.size(), nullptr);
    std::vector<taskvec::peft_tensor> after(members.size());
    for (std::size_t m = 0; m < members.size(); ++m) {
        const auto place = members[m].adapter->others.find(name);
        if (place != members[m].adapter->others.end()) { before[m] = &place->second; }
    }
    for (std::size_t m = 0; m < members.size(); ++m) {
        if (!before[m]) { continue; }
        after[m] = {before[m]->dtype, before[m]->shape, {}};
        after[m].shape[0] = static_cast<std::int64_t>(rows[m].size());
        const std::size_t columns = taskvec::element_count(before[m]->shape)
            / static_cast<std::size_t>(std::max<std::int64_t>(before[m]->shape[0], 1));
        taskvec::visit_storage(before[m]->dtype, name, [&]<class S>(std::type_identity<S>) {
            after[m].bytes.resize(rows[m].size() * columns * sizeof(S));
            for (std::size_t i = 0; i < rows[m].size(); ++i) {
                const auto sources =
                    sources_of(rows, m, i, [&](std::size_t other) { return before[other] != nullptr; });
                if (sources.empty()) { refuse_lacking_rows(name, i, members[m].adapter->label); }
                const auto& from = *before[sources[0].adapter];
                if (sources.size() == 1 && from.dtype == before[m]->dtype) {
                    std::memcpy(after[m].bytes.data() + i * columns * sizeof(S),
                        from.bytes.data() + static_cast<std::size_t>(sources[0].row) * columns * sizeof(S),
                        columns * sizeof(S));
                    continue;
                }
                std::vector<double> sum(columns);
                for (const auto& one : sources) {
                    add_row(*before[one.adapter], name, one.row * columns, one.share, sum);
                }
                for (std::size_t k = 0; k < columns; ++k) {
                    const S value = taskvec::narrow<S>(static_cast<taskvec::arithmetic_type<S>>(sum[k]));
                    std::memcpy(after[m].bytes.data() + (i * columns + k) * sizeof(S), &value, sizeof(S));
                }
            }
        });
    }
    for (std::size_t m = 0; m < members.size(); ++m) {
        if (before[m]) { members[m].adapter->others.at(name) = std::move(after[m]); }
    }
}

} // namespace

template <class T>
token_alignment align_tokens(adapter_group<T>& group)
{
    auto members = adapters_with_tokens(group);
    if (members.size() < 2) { return {}; }
    std::vector<vocabulary_input> inputs;
    for (const auto& member : members) { inputs.push_back(member.input); }
    const lined_up_vocabulary lined(inputs, vocabulary_policy_of(group.given.vocabulary), {}, group.given.run);
    for (const auto& name : lined.tensors()) {
        std::vector<rows_of_tokens> rows;
        for (std::size_t m = 0; m < members.size(); ++m) {
            rows.push_back(members[m].shapes.find(name) ? lined.rows_in(name, m) : rows_of_tokens());
        }
        line_up_factors(members, rows, name, group.given.in_phi());
        std::set<std::string> whole; // the weight itself, or copies of it
        for (const auto& member : members) {
            for (const auto& other : member.adapter->others) {
                if (weight_of(other.first) == name) { whole.insert(other.first); }
            }
        }
        for (const auto& tensor : whole) { line_up_whole(members, rows, tensor); }
    }
    token_alignment result{lined.changed()};
    if (!result.changed) { return result; }
    const auto changed = lined.tokenizer_files(group.given.run);
    for (const auto& file : tokenizer_files_in(inputs.front().path)) {
        const auto name = file.filename().string();
        const auto place = changed.find(name);
        if (place == changed.end()) { result.tokenizer[name] = read_watched(file, std::size_t{4} << 30); }
        else if (place->second) {
            result.tokenizer[name] = *place->second;
        }
    }
    return result;
}

template token_alignment align_tokens(adapter_group<float>&);
template token_alignment align_tokens(adapter_group<double>&);

} // namespace tool
