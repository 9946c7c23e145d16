// The update of one module of an adapter, from the tensors of it: LoRA, DoRA, AdaLoRA, LoHa, LoKr.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/adapter_roles.hpp>
#include <taskvec/formats/adapter_tensors.hpp>
#include <taskvec/formats/factor_products.hpp>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// A module as its tensors say it.
template <class T>
struct unscaled_module {
    adapted_module<T> made{}; ///< its scalings are 1
    std::size_t rank = 0; ///< that its α is divided by; 0: its factors have none, and no scaling
};

/// Reads one module of an adapter from its tensors, whatever it is made of. For one call of read().
template <class T>
class module_reader {
public:
    /// Refers to all but the dialect.
    module_reader(
        const safetensors_file& file, const std::string& module, const adapter_parts& parts, adapter_dialect dialect)
        : file_(file)
        , module_(module)
        , parts_(parts)
        , dialect_(dialect)
        , refuse_{file.path().string()}
    { }
    /// Throws format_error for halves without partners, factors of more than one kind or of none, a rank of 0, and what
    /// no update can say; shape_mismatch; dtype_mismatch.
    [[nodiscard]] unscaled_module<T> read()
    {
        switch (form()) {
        case factor_form::lora: read_lora(false); break;
        case factor_form::embedding: read_lora(true); break;
        case factor_form::loha: read_loha(); break;
        case factor_form::lokr: read_lokr(); break;
        }
        return {std::move(made_), rank_};
    }

private:
    using role = adapter_role;

    template <class... Parts>
    [[noreturn]] void refuse_shape(const Parts&... parts) const
    {
        raise<shape_mismatch>(error_code::factor_rank, message("'", refuse_.file, "': ", parts...));
    }

    /// What the module is made of.
    [[nodiscard]] factor_form form() const
    {
        std::set<factor_form> forms;
        for (const auto& one : parts_.tensors) {
            if (const auto found = form_of(one.first)) { forms.insert(*found); }
        }
        if (forms.size() != 1) {
            refuse_(error_code::adapter_tensors, "module '", module_, "' has ",
                forms.empty() ? "an alpha, a magnitude or a bias but no factors" : "factors of more than one kind");
        }
        return *forms.begin();
    }
    /// A tensor that the module must have; messages call it `word`, and `other` what makes it needed.
    [[nodiscard]] const safetensors_entry& need(role::what which, std::string_view word, std::string_view other) const
    {
        const auto* const found = parts_.get(which);
        if (!found) {
            refuse_(error_code::adapter_tensors, "module '", module_, "' has ", other, " but no ", word,
                ": half of its update is missing");
        }
        return *found;
    }
    /// A factor's values; the module is stored as widely as the widest of them.
    [[nodiscard]] matrix<T> factor(const safetensors_entry& entry)
    {
        made_.stored = any_ ? wider(made_.stored, entry.dtype) : entry.dtype;
        any_ = true;
        return read_flat_factor<T>(file_, entry);
    }
    /// The core of a Tucker decomposition, between factors of these ranks. Its kernel is the module's.
    [[nodiscard]] matrix<T> core_between(const safetensors_entry& entry, std::size_t left, std::size_t right)
    {
        refuse_rank_0(std::min(left, right));
        if (entry.shape.size() < 3 || static_cast<std::size_t>(entry.shape[0]) != left
            || static_cast<std::size_t>(entry.shape[1]) != right) {
            refuse_shape("tensor '", entry.name, "' has shape ", to_string(entry.shape),
                ", which does not fit between its factors of ranks ", left, " and ", right);
        }
        const extents kernel(entry.shape.begin() + 2, entry.shape.end());
        if (!made_.kernel.empty() && made_.kernel != kernel) {
            refuse_shape("tensor '", entry.name, "' has shape ", to_string(entry.shape),
                ", which is of another kernel than the other core of module '", module_, "'");
        }
        made_.kernel = kernel;
        return factor(entry);
    }
    /// Makes a product left·right of core ×₁ left ×₂ right, where `left` is stored r×out.
    void join_core(const safetensors_entry& core, matrix<T>& left, matrix<T>& right)
    {
        right = along_core(core_between(core, left.rows(), right.rows()), right);
        left = transposed_copy(left);
    }
    void refuse_rank_0(std::size_t rank) const
    {
        if (rank == 0) { refuse_(error_code::adapter_tensors, "module '", module_, "' has rank 0"); }
    }
    /// Refuses factors that make no product.
    void check_fit(const matrix<T>& b, const matrix<T>& a, std::string_view left, std::string_view right) const
    {
        if (b.cols() != a.rows()) {
            refuse_shape("module '", module_, "': ", left, " is ", b.rows(), "×", b.cols(), " and ", right, " ",
                a.rows(), "×", a.cols(), "; their ranks differ");
        }
        refuse_rank_0(a.rows());
    }
    /// Refuses what stands beside factors that know nothing of it.
    void refuse_beside() const
    {
        for (const auto which : {role::magnitude, role::bias, role::mid, role::singular}) {
            const auto* const beside = parts_.get(which);
            if (!beside) { continue; }
            refuse_(error_code::adapter_unsupported, "tensor '", beside->name, "' stands beside the factors of ",
                made_.kind, " in module '", module_,
                "', whose update is another one with it: fold it into its base with what wrote it");
        }
    }

    /// (w1a·w1b)∘(w2a·w2b): an update of rank r1·r2, exactly.
    void read_loha()
    {
        made_.kind = "LoHa";
        refuse_beside();
        constexpr std::string_view others = "other LoHa factors";
        auto w1a = factor(need(role::hada_w1_a, "hada_w1_a", others)),
             w1b = factor(need(role::hada_w1_b, "hada_w1_b", others)),
             w2a = factor(need(role::hada_w2_a, "hada_w2_a", others)),
             w2b = factor(need(role::hada_w2_b, "hada_w2_b", others));
        if (parts_.get(role::hada_t1) || parts_.get(role::hada_t2)) {
            const auto &t1 = need(role::hada_t1, "hada_t1", "hada_t2"), &t2 = need(role::hada_t2, "hada_t2", "hada_t1");
            join_core(t1, w1a, w1b);
            join_core(t2, w2a, w2b);
        }
        check_fit(w1a, w1b, "hada_w1_a", "hada_w1_b");
        check_fit(w2a, w2b, "hada_w2_a", "hada_w2_b");
        if (w1a.rows() != w2a.rows() || w1b.cols() != w2b.cols()) {
            refuse_shape("module '", module_, "': the two products of LoHa are ", w1a.rows(), "×", w1b.cols(), " and ",
                w2a.rows(), "×", w2b.cols());
        }
        rank_ = w1b.rows();
        made_.update.b = face_splitting(w1a, w2a);
        made_.update.a = khatri_rao(w1b, w2b);
    }

    /// One side of LoKr's product: `left`, or left·right.
    struct lokr_side {
        matrix<T> left{}, right{};
        [[nodiscard]] bool whole() const { return right.empty(); }
    };
    /// w1 or w2, from a tensor of that name or from two; `core`: between those, where there is one.
    [[nodiscard]] lokr_side read_side(std::string_view name, role::what whole, role::what left, role::what right,
        const safetensors_entry* core = nullptr)
    {
        lokr_side side;
        if (const auto* const entry = parts_.get(whole)) {
            side.left = factor(*entry);
            return side;
        }
        const auto a = message(name, "_a"), b = message(name, "_b");
        side.left = factor(need(left, message(name, " or ", a), "other LoKr factors"));
        side.right = factor(need(right, b, a));
        if (core) { join_core(*core, side.left, side.right); }
        check_fit(side.left, side.right, a, b);
        return side;
    }
    /// The kernel of a convolution whose w2 is stored whole. Refuses one that is no Kronecker product of matrices.
    void take_kernel_of_whole_w2()
    {
        const auto* const w2 = parts_.get(role::lokr_w2);
        if (!w2) { return; }
        if (parts_.get(role::lokr_t2)) {
            refuse_(error_code::adapter_tensors, "module '", module_,
                "' has lokr_w2 whole, and a core lokr_t2 of it: one of the two is another module's");
        }
        if (w2->shape.size() == 3 && dialect_ == adapter_dialect::peft) {
            refuse_(error_code::adapter_unsupported, "tensor '", w2->name, "' has shape ", to_string(w2->shape),
                ": of a convolution over one side PEFT lays LoKr's product out in another order than the weight's, "
                "which no update of low rank equals; ",
                fold_with_peft);
        }
        if (w2->shape.size() > 2) { made_.kernel.assign(w2->shape.begin() + 2, w2->shape.end()); }
    }
    /// w1 ⊗ w2, with w2 = left·right: as (w1 ⊗ left)·(1 ⊗ right), or, where w1 has factors too and the smaller rank, as
    /// the product of those Kronecker products.
    void read_lokr()
    {
        made_.kind = "LoKr";
        refuse_beside();
        auto w1 = read_side("lokr_w1", role::lokr_w1, role::lokr_w1_a, role::lokr_w1_b);
        take_kernel_of_whole_w2();
        auto w2 = read_side("lokr_w2", role::lokr_w2, role::lokr_w2_a, role::lokr_w2_b, parts_.get(role::lokr_t2));
        rank_ = !w2.whole() ? w2.right.rows() : !w1.whole() ? w1.right.rows() : 0;
        if (w2.whole()) {
            w2.right = std::move(w2.left);
            w2.left = identity_matrix<T>(w2.right.rows());
        }
        const std::size_t inner = w2.right.rows(), columns = w1.whole() ? w1.left.cols() : w1.right.cols();
        if (w1.whole() || w1.right.rows() * inner >= columns * inner) {
            if (!w1.whole()) { w1.left = matrix_product(w1.left, w1.right); }
            w1.right = identity_matrix<T>(columns);
        }
        made_.update.b = kronecker(w1.left, w2.left);
        made_.update.a = kronecker(w1.right, w2.right);
    }

    /// b·a, with what PEFT and kohya put beside the two.
    void read_lora(bool embedding)
    {
        const bool mlx = dialect_ == adapter_dialect::mlx, peft = dialect_ == adapter_dialect::peft;
        const bool called = peft || embedding; // lora_A and lora_B
        const auto& a = need(embedding ? role::embedding_a : role::a, called ? "lora_A" : "its down factor",
            called ? "lora_B" : "an up factor");
        const auto& b = need(embedding ? role::embedding_b : role::b, called ? "lora_B" : "its up factor",
            called ? "lora_A" : "a down factor");
        made_.embedding = embedding || (mlx && is_mlx_embedding(module_));
        if (mlx) { refuse_mlx_experts({&a, &b}); }
        made_.update.a = factor(a);
        made_.update.b = factor(b);
        if (mlx && made_.embedding && parts_.get(role::magnitude)) { // one for each entry: the outputs are these
            made_.embedding = false;
            std::swap(made_.update.a, made_.update.b);
        }
        else if (mlx) {
            made_.update.a = transposed_copy(made_.update.a);
            made_.update.b = transposed_copy(made_.update.b);
        }
        take_kernel(a, b);
        if (const auto* const mid = parts_.get(role::mid)) { join_mid(*mid, a); }
        check_fit(
            made_.update.b, made_.update.a, peft ? "lora_B" : "the up factor", peft ? "lora_A" : "the down factor");
        rank_ = made_.update.a.rows();
        if (const auto* const values = parts_.get(role::singular)) { take_singular_values(*values); }
        if (const auto* const magnitude = parts_.get(role::magnitude)) { take_magnitude(*magnitude); }
        if (const auto* const bias = parts_.get(role::bias)) { take_bias(*bias); }
    }
    void refuse_mlx_experts(std::initializer_list<const safetensors_entry*> factors) const
    {
        for (const auto* entry : factors) {
            if (entry->shape.size() == 2) { continue; }
            refuse_(error_code::adapter_unsupported, "tensor '", entry->name, "' has shape ", to_string(entry->shape),
                "; expected a matrix: updates of experts (MLX's LoRASwitchLinear) are not read, fuse them with "
                "mlx_lm.fuse and go on with the model");
        }
    }
    /// The kernel of a convolution, which its first factor has.
    void take_kernel(const safetensors_entry& a, const safetensors_entry& b)
    {
        if (a.shape.size() > 2) { made_.kernel.assign(a.shape.begin() + 2, a.shape.end()); }
        if (b.shape.size() > 2
            && std::any_of(b.shape.begin() + 2, b.shape.end(), [](auto side) { return side != 1; })) {
            refuse_(error_code::adapter_unsupported, "tensor '", b.name, "' has shape ", to_string(b.shape),
                "; of a convolution's factors only the first has a kernel");
        }
    }
    /// up·mid·down, where `mid` has the kernel and not `down`.
    void join_mid(const safetensors_entry& mid, const safetensors_entry& down)
    {
        if (std::any_of(made_.kernel.begin(), made_.kernel.end(), [](auto side) { return side != 1; })) {
            refuse_(error_code::adapter_unsupported, "tensor '", down.name, "' has shape ", to_string(down.shape),
                "; beside a '", mid.name, "' only that has a kernel");
        }
        made_.kernel.clear();
        made_.update.a = along_core(core_between(mid, made_.update.b.cols(), made_.update.a.rows()), made_.update.a);
    }
    /// AdaLoRA: b·diag(e)·a.
    void take_singular_values(const safetensors_entry& entry)
    {
        made_.kind = "AdaLoRA";
        const auto e = read_flat_factor<T>(file_, entry);
        if (e.size() != rank_) {
            refuse_shape("tensor '", entry.name, "' has shape ", to_string(entry.shape), ", and module '", module_,
                "' has rank ", rank_);
        }
        for (std::size_t k = 0; k < rank_; ++k) {
            for (std::size_t i = 0; i < made_.update.a.cols(); ++i) { made_.update.a(k, i) *= e.data()[k]; }
        }
    }
    void take_magnitude(const safetensors_entry& entry)
    {
        made_.kind = "DoRA";
        const auto values = read_flat_factor<double>(file_, entry);
        made_.magnitude.assign(values.data(), values.data() + values.size());
        const std::size_t outputs = made_.update.out();
        const bool by_output = dialect_ != adapter_dialect::kohya
            || (!entry.shape.empty() && static_cast<std::size_t>(entry.shape[0]) == outputs);
        if (made_.magnitude.size() != outputs || !by_output) {
            refuse_(error_code::adapter_unsupported, "tensor '", entry.name, "' has shape ", to_string(entry.shape),
                ", and module '", module_, "' has ", outputs,
                " outputs: DoRA is folded where it has a magnitude for each output; fold it into its base with what "
                "wrote it");
        }
    }
    void take_bias(const safetensors_entry& entry)
    {
        made_.bias.a = read_flat_factor<T>(file_, entry);
        const std::size_t outputs = made_.update.out();
        if (made_.bias.a.rows() != 1 || made_.bias.a.cols() != outputs) {
            refuse_(error_code::adapter_tensors, "tensor '", entry.name, "' has shape ", to_string(entry.shape),
                ", and module '", module_, "' has ", outputs, " outputs");
        }
        made_.bias.b = identity_matrix<T>(1);
    }

    const safetensors_file& file_;
    const std::string& module_;
    const adapter_parts& parts_;
    adapter_dialect dialect_;
    refusal refuse_;
    adapted_module<T> made_{};
    std::size_t rank_ = 0;
    bool any_ = false; ///< a factor has been read
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
