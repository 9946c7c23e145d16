// The update of one module of an adapter, from the tensors of it: LoRA, DoRA, AdaLoRA, LoHa, LoKr.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/adapter_roles.hpp>
#include <taskvec/formats/factor_products.hpp>

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// The tensors of one module.
struct adapter_parts {
    std::map<adapter_role::what, const safetensors_entry*> tensors{};
    [[nodiscard]] const safetensors_entry* get(adapter_role::what which) const
    {
        const auto place = tensors.find(which);
        return place == tensors.end() ? nullptr : place->second;
    }
};

/// One module's update, without its scaling. `rank` receives what its α is divided by.
template <class T>
[[nodiscard]] adapted_module<T> read_module(const safetensors_file& file, const std::string& module,
    const adapter_parts& parts, adapter_dialect dialect, std::size_t& rank)
{
    using role = adapter_role;
    const std::string where = file.path().string();
    adapted_module<T> made;
    const auto need = [&](role::what which, std::string_view word, std::string_view other) -> const safetensors_entry& {
        const auto* const found = parts.get(which);
        if (!found) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has ", other, " but no ", word, ": half of its update is missing"),
                where);
        }
        return *found;
    };
    bool any = false;
    const auto factor = [&](const safetensors_entry& entry) {
        made.stored = any ? wider(made.stored, entry.dtype) : entry.dtype;
        any = true;
        return read_flat_factor<T>(file, entry);
    };
    const auto fits = [&](const matrix<T>& b, const matrix<T>& a, std::string_view left, std::string_view right) {
        if (b.cols() != a.rows()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': module '", module, "': ", left, " is ", b.rows(), "×", b.cols(), " and ", right,
                    " ", a.rows(), "×", a.cols(), "; their ranks differ"));
        }
        if (a.rows() == 0) {
            raise<format_error>(error_code::adapter_tensors, message("module '", module, "' has rank 0"), where);
        }
    };
    const auto core_of = [&](role::what which, std::size_t left, std::size_t right) { // of a Tucker decomposition
        const auto& entry = *parts.get(which);
        if (left == 0 || right == 0) {
            raise<format_error>(error_code::adapter_tensors, message("module '", module, "' has rank 0"), where);
        }
        if (entry.shape.size() < 3 || static_cast<std::size_t>(entry.shape[0]) != left
            || static_cast<std::size_t>(entry.shape[1]) != right) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': tensor '", entry.name, "' has shape ", to_string(entry.shape),
                    ", which does not fit between its factors of ranks ", left, " and ", right));
        }
        const extents kernel(entry.shape.begin() + 2, entry.shape.end());
        if (!made.kernel.empty() && made.kernel != kernel) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': tensor '", entry.name, "' has shape ", to_string(entry.shape),
                    ", which is of another kernel than the other core of module '", module, "'"));
        }
        made.kernel = kernel;
        made.stored = wider(made.stored, entry.dtype);
        return read_flat_factor<T>(file, entry);
    };
    const bool is_hada = parts.get(role::hada_w1_a) || parts.get(role::hada_w1_b) || parts.get(role::hada_w2_a)
        || parts.get(role::hada_w2_b) || parts.get(role::hada_t1) || parts.get(role::hada_t2);
    const bool is_lokr = parts.get(role::lokr_w1) || parts.get(role::lokr_w1_a) || parts.get(role::lokr_w1_b)
        || parts.get(role::lokr_w2) || parts.get(role::lokr_w2_a) || parts.get(role::lokr_w2_b)
        || parts.get(role::lokr_t2);
    const bool is_embedding = parts.get(role::embedding_a) || parts.get(role::embedding_b);
    const bool is_lora = parts.get(role::a) || parts.get(role::b);
    if (int{is_hada} + int{is_lokr} + int{is_embedding} + int{is_lora} != 1) {
        raise<format_error>(error_code::adapter_tensors,
            message("module '", module, "' has ",
                is_hada || is_lokr || is_embedding || is_lora ? "factors of more than one kind"
                                                              : "an alpha, a magnitude or a bias but no factors"),
            where);
    }
    for (const auto which : {role::magnitude, role::bias, role::mid, role::singular}) {
        const auto* const beside = is_hada || is_lokr ? parts.get(which) : nullptr;
        if (!beside) { continue; }
        raise<format_error>(error_code::adapter_unsupported,
            message("tensor '", beside->name, "' stands beside the factors of ", is_hada ? "LoHa" : "LoKr",
                " in module '", module,
                "', whose update is another one with it: fold it into its base with what wrote it"),
            where);
    }
    if (is_hada) { // (w1a·w1b)∘(w2a·w2b): an update of rank r1·r2, exactly
        made.kind = "LoHa";
        auto w1a = factor(need(role::hada_w1_a, "hada_w1_a", "other LoHa factors")),
             w1b = factor(need(role::hada_w1_b, "hada_w1_b", "other LoHa factors")),
             w2a = factor(need(role::hada_w2_a, "hada_w2_a", "other LoHa factors")),
             w2b = factor(need(role::hada_w2_b, "hada_w2_b", "other LoHa factors"));
        if (parts.get(role::hada_t1) || parts.get(role::hada_t2)) { // each is t×1 wₐ×2 w_b, and wₐ lies r×out
            (void)need(role::hada_t1, "hada_t1", "hada_t2");
            (void)need(role::hada_t2, "hada_t2", "hada_t1");
            w1b = along_core(core_of(role::hada_t1, w1a.rows(), w1b.rows()), w1b);
            w2b = along_core(core_of(role::hada_t2, w2a.rows(), w2b.rows()), w2b);
            w1a = turned_over(w1a);
            w2a = turned_over(w2a);
        }
        fits(w1a, w1b, "hada_w1_a", "hada_w1_b");
        fits(w2a, w2b, "hada_w2_a", "hada_w2_b");
        if (w1a.rows() != w2a.rows() || w1b.cols() != w2b.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': module '", module, "': the two products of LoHa are ", w1a.rows(), "×",
                    w1b.cols(), " and ", w2a.rows(), "×", w2b.cols()));
        }
        rank = w1b.rows();
        const std::size_t r1 = w1b.rows(), r2 = w2b.rows();
        made.update.b = matrix<T>(w1a.rows(), r1 * r2, matrix_order::row_major);
        made.update.a = matrix<T>(r1 * r2, w1b.cols(), matrix_order::row_major);
        for (std::size_t k = 0; k < r1 * r2; ++k) {
            for (std::size_t i = 0; i < w1a.rows(); ++i) { made.update.b(i, k) = w1a(i, k / r2) * w2a(i, k % r2); }
            for (std::size_t j = 0; j < w1b.cols(); ++j) { made.update.a(k, j) = w1b(k / r2, j) * w2b(k % r2, j); }
        }
        return made;
    }
    if (is_lokr) { // w1 ⊗ w2, as (w1 ⊗ left)·(1 ⊗ right) with w2 = left·right, or the other way round
        made.kind = "LoKr";
        const auto half = [&](role::what whole, role::what left, role::what right, std::string_view name) {
            std::pair<matrix<T>, matrix<T>> found; // left and right; right empty: whole
            if (const auto* const entry = parts.get(whole)) {
                if (whole == role::lokr_w2 && parts.get(role::lokr_t2)) {
                    raise<format_error>(error_code::adapter_tensors,
                        message("module '", module,
                            "' has lokr_w2 whole, and a core lokr_t2 of it: one of the two is "
                            "another module's"),
                        where);
                }
                if (whole == role::lokr_w2 && entry->shape.size() == 3 && dialect == adapter_dialect::peft) {
                    raise<format_error>(error_code::adapter_unsupported,
                        message("tensor '", entry->name, "' has shape ", to_string(entry->shape),
                            ": of a convolution over one side PEFT lays LoKr's product out in another order than the "
                            "weight's, which no update of low rank equals; ",
                            fold_with_peft),
                        where);
                }
                found.first = factor(*entry);
                if (whole == role::lokr_w2 && entry->shape.size() > 2) {
                    made.kernel.assign(entry->shape.begin() + 2, entry->shape.end());
                }
                return found;
            }
            found.first = factor(need(left, message(name, " or ", name, "_a"), "other LoKr factors"));
            found.second = factor(need(right, message(name, "_b"), message(name, "_a")));
            if (whole == role::lokr_w2 && parts.get(role::lokr_t2)) { // w2 = t×1 wₐ×2 w_b, and wₐ lies r×out
                found.second =
                    along_core(core_of(role::lokr_t2, found.first.rows(), found.second.rows()), found.second);
                found.first = turned_over(found.first);
            }
            fits(found.first, found.second, message(name, "_a"), message(name, "_b"));
            return found;
        };
        const auto w1 = half(role::lokr_w1, role::lokr_w1_a, role::lokr_w1_b, "lokr_w1"),
                   w2 = half(role::lokr_w2, role::lokr_w2_a, role::lokr_w2_b, "lokr_w2");
        rank = !w2.second.empty() ? w2.second.rows() : !w1.second.empty() ? w1.second.rows() : 0; // 0: no scale
        const std::size_t v = w1.second.empty() ? w1.first.cols() : w1.second.cols();
        const std::size_t inner = w2.second.empty() ? w2.first.rows() : w2.second.rows();
        const auto product = [](const matrix<T>& x, const matrix<T>& y) {
            if (y.empty()) { return x; }
            matrix<T> z(x.rows(), y.cols(), matrix_order::row_major);
            for (std::size_t i = 0; i < x.rows(); ++i) {
                for (std::size_t j = 0; j < y.cols(); ++j) {
                    T sum = 0;
                    for (std::size_t k = 0; k < x.cols(); ++k) { sum += x(i, k) * y(k, j); }
                    z(i, j) = sum;
                }
            }
            return z;
        };
        if (!w1.second.empty() && w1.second.rows() * inner < v * inner) { // the rank of w1 is the smaller one
            made.update.b = kronecker(w1.first, w2.second.empty() ? identity_matrix<T>(inner) : w2.first);
            made.update.a = kronecker(w1.second, w2.second.empty() ? w2.first : w2.second);
        }
        else {
            const auto whole = product(w1.first, w1.second);
            made.update.b = kronecker(whole, w2.second.empty() ? identity_matrix<T>(inner) : w2.first);
            made.update.a = kronecker(identity_matrix<T>(v), w2.second.empty() ? w2.first : w2.second);
        }
        return made;
    }
    const auto& a = is_embedding ? need(role::embedding_a, "lora_A", "lora_B")
                                 : need(role::a, dialect == adapter_dialect::peft ? "lora_A" : "its down factor",
                                       dialect == adapter_dialect::peft ? "lora_B" : "an up factor");
    const auto& b = is_embedding ? need(role::embedding_b, "lora_B", "lora_A")
                                 : need(role::b, dialect == adapter_dialect::peft ? "lora_B" : "its up factor",
                                       dialect == adapter_dialect::peft ? "lora_A" : "a down factor");
    made.embedding = is_embedding || (dialect == adapter_dialect::mlx && is_mlx_embedding(module));
    made.stored = wider(a.dtype, b.dtype);
    for (const auto* entry : {&a, &b}) {
        if (dialect != adapter_dialect::mlx || entry->shape.size() == 2) { continue; }
        raise<format_error>(error_code::adapter_unsupported,
            message("tensor '", entry->name, "' has shape ", to_string(entry->shape),
                "; expected a matrix: updates of experts (MLX's LoRASwitchLinear) are not read, fuse them with "
                "mlx_lm.fuse "
                "and go on with the model"),
            where);
    }
    made.update.a = read_flat_factor<T>(file, a);
    made.update.b = read_flat_factor<T>(file, b);
    if (dialect == adapter_dialect::mlx) {
        made.update.a = turned_over(made.update.a);
        made.update.b = turned_over(made.update.b);
    }
    if (a.shape.size() > 2) { made.kernel.assign(a.shape.begin() + 2, a.shape.end()); }
    for (std::size_t i = 2; i < b.shape.size(); ++i) {
        if (b.shape[i] != 1) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", b.name, "' has shape ", to_string(b.shape),
                    "; of a convolution's factors only the first has a kernel"),
                where);
        }
    }
    if (const auto* const mid = parts.get(role::mid)) { // up·mid·down, mid with the kernel
        if (std::any_of(made.kernel.begin(), made.kernel.end(), [](auto side) { return side != 1; })) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", a.name, "' has shape ", to_string(a.shape), "; beside a '", mid->name,
                    "' only that has a kernel"),
                where);
        }
        made.kernel.clear();
        made.update.a = along_core(core_of(role::mid, made.update.b.cols(), made.update.a.rows()), made.update.a);
    }
    fits(made.update.b, made.update.a, dialect == adapter_dialect::peft ? "lora_B" : "the up factor",
        dialect == adapter_dialect::peft ? "lora_A" : "the down factor");
    rank = made.update.a.rows();
    if (const auto* const values = parts.get(role::singular)) { // AdaLoRA: b·diag(e)·a
        made.kind = "AdaLoRA";
        const auto e = read_flat_factor<T>(file, *values);
        if (e.size() != rank) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': tensor '", values->name, "' has shape ", to_string(values->shape),
                    ", and module '", module, "' has rank ", rank));
        }
        for (std::size_t k = 0; k < rank; ++k) {
            for (std::size_t i = 0; i < made.update.a.cols(); ++i) { made.update.a(k, i) *= e.data()[k]; }
        }
    }
    if (const auto* const vector = parts.get(role::magnitude)) {
        made.kind = "DoRA";
        const auto values = read_flat_factor<double>(file, *vector);
        made.magnitude.assign(values.data(), values.data() + values.size());
        const bool by_output = dialect != adapter_dialect::kohya
            || (!vector->shape.empty() && static_cast<std::size_t>(vector->shape[0]) == made.update.out());
        if (made.magnitude.size() != made.update.out() || !by_output) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", vector->name, "' has shape ", to_string(vector->shape), ", and module '", module,
                    "' has ", made.update.out(),
                    " outputs: DoRA is folded where it has a magnitude for each output; "
                    "fold it into its base with what wrote it"),
                where);
        }
    }
    if (const auto* const bias = parts.get(role::bias)) {
        made.bias.a = read_flat_factor<T>(file, *bias);
        if (made.bias.a.rows() != 1 || made.bias.a.cols() != made.update.out()) {
            raise<format_error>(error_code::adapter_tensors,
                message("tensor '", bias->name, "' has shape ", to_string(bias->shape), ", and module '", module,
                    "' has ", made.update.out(), " outputs"),
                where);
        }
        made.bias.b = identity_matrix<T>(1);
    }
    return made;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
