// Adapters on a base: read in any dialect, lined up with its names, and added up without forming their updates.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "architectures.hpp"
#include "arguments.hpp"
#include "names.hpp"
#include "words.hpp"

#include <taskvec/adapters/adapted_model.hpp>
#include <taskvec/formats/adapter_names.hpp>
#include <taskvec/formats/checkpoint.hpp>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace tool {

/// An adapter's file of tensors, in any dialect, with its map known to the handler for files that shrink.
[[nodiscard]] taskvec::checkpoint open_adapter(const fs::path& path);
/// taskvec::split_flux(), with a note.
template <class T>
void translate_flux(taskvec::adapter_contents<T>& adapter, const taskvec::const_model_ref& base, const run_options& run)
{
    const auto count = taskvec::split_flux(adapter, base);
    if (count == 0) { return; }
    note(run,
        taskvec::message(adapter.label, " has ", count, count == 1 ? " module" : " modules",
            " under the names of FLUX's authors: translated to the base's, diffusers'"));
}
/// Puts rows back that a GGUF adapter holds in llama.cpp's order, by the heads that the config.json beside the base
/// counts. Throws where that is another family's, or does not say.
template <class T>
void restore_rows(taskvec::adapter_contents<T>& adapter, const fs::path& base)
{
    if (adapter.dialect != taskvec::adapter_dialect::gguf) { return; }
    const auto config = config_beside(base);
    taskvec::gguf_target target;
    if (config.contains("architectures")) {
        target = taskvec::gguf_target_of(config, (base / "config.json").string());
        if (target.architecture != adapter.target.architecture) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                taskvec::message(adapter.label, " is an adapter for llama.cpp's architecture ",
                    adapter.target.architecture, ", and ", in_quotes(base), " is ", target.architecture,
                    ": use the base that it was trained on"));
        }
    }
    const auto& own = adapter.target;
    if (own.heads > 0 && target.heads > 0 && target.pairs_rows()
        && (own.heads != target.heads || own.kv_heads != target.kv_heads)) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
            taskvec::message(adapter.label, " says that its model has ", own.heads, " heads of attention (",
                own.kv_heads, " of keys), and the config.json of ", in_quotes(base), " ", target.heads, " (",
                target.kv_heads, "): use the base that it was trained on"));
    }
    taskvec::unpair_rows(adapter, target.heads, target.kv_heads);
}

template <class T>
bool same_entries(const taskvec::matrix<T>& x, const taskvec::matrix<T>& y, bool turned = false)
{
    if (x.rows() != (turned ? y.cols() : y.rows()) || x.cols() != (turned ? y.rows() : y.cols())) { return false; }
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) {
            if (x(i, j) != (turned ? y(j, i) : y(i, j))) { return false; }
        }
    }
    return true;
}
/// Whether two modules change one matrix alike. `turned`: the first is factored as an embedding, the second is not.
template <class T>
bool same_change(const taskvec::adapted_module<T>& x, const taskvec::adapted_module<T>& y)
{
    const bool turned = x.embedding != y.embedding;
    return x.update.scaling == y.update.scaling
        && (turned ? x.magnitude.empty() && y.magnitude.empty() : x.magnitude == y.magnitude)
        && same_entries(x.update.a, turned ? y.update.b : y.update.a, turned)
        && same_entries(x.update.b, turned ? y.update.a : y.update.b, turned);
}
/// An embedding's module, for the head that is the same matrix: factored as a linear layer, unless DoRA rescales the
/// embedding's dimensions.
template <class T>
[[nodiscard]] taskvec::adapted_module<T> as_head(taskvec::adapted_module<T> made)
{
    if (!made.embedding || !made.magnitude.empty()) { return made; }
    made.embedding = false;
    auto b = taskvec::transposed_copy(made.update.a);
    made.update.a = taskvec::transposed_copy(made.update.b);
    made.update.b = std::move(b);
    return made;
}

/// Σ weight·(what each adapter does), for a base. Never moves: changes() points into it.
class adapter_sum {
public:
    struct settings {
        fs::path base_path;
        std::function<bool(std::string_view)>
            include{}; ///< modules without a weight in the base that it leaves out are no error
        std::vector<std::string> included{}; ///< the patterns of --include, for the error where nothing is left
        std::vector<std::string> excluded{}; ///< those of --exclude: of names of the adapter's own too
        name_rules names{}; ///< of modules and whole tensors, by the texts of the arguments
        bool fan_in_fan_out = false; ///< square weights lie in×out
        bool subtract = false;
        bool may_untie = true; ///< a head that is tied to an embedding may become a tensor of its own
        std::string label{}; ///< what messages call the base; empty: its path

        [[nodiscard]] std::string base_label() const { return label.empty() ? in_quotes(base_path) : label; }
    };
    adapter_sum(const std::vector<task_argument>& arguments, const taskvec::checkpoint& base, const settings& how,
        const run_options& run);
    adapter_sum(const adapter_sum&) = delete;
    adapter_sum& operator=(const adapter_sum&) = delete;

    /// The base's tensors, and its head beside the embedding that it was tied to, where the two come apart.
    [[nodiscard]] const taskvec::const_model_ref& base() const { return base_; }
    [[nodiscard]] const taskvec::adapted_model& changes() const { return changes_; }
    /// Whether the head has a tensor of its own now, or other values than the embedding.
    [[nodiscard]] bool untied() const { return untied_; }
    /// The files of tensors, in the order of the arguments.
    [[nodiscard]] const std::deque<taskvec::checkpoint>& files() const { return files_; }
    [[nodiscard]] std::uint64_t bytes() const;

    struct facts {
        std::string dialect;
        std::size_t modules = 0, wholes = 0, least_rank = 0, greatest_rank = 0;
    };
    [[nodiscard]] const std::vector<facts>& about() const { return facts_; }

private:
    using adapter = std::variant<taskvec::adapter_contents<float>, taskvec::adapter_contents<double>>;
    /// What an adapter has of an embedding and the head that is tied to it, by its own names; empty: nothing.
    struct tied_modules {
        std::string embedding{}, head{};
        bool as_one = false; ///< what it does to the embedding it does to the head
    };
    /// An embedding or a head that an adapter brought with more rows than the base has.
    struct grown_tensor {
        std::string label{}; ///< the adapter's
        taskvec::const_tensor_ref before{}, now{};
    };

    /// Lines names up with the base's, as far as an adapter says by itself what they mean.
    template <class T>
    [[nodiscard]] tied_modules prepare(
        taskvec::adapter_contents<T>& read, const task_argument& argument, const settings& how, const run_options& run);
    /// Finds what its modules mean in the base, and leaves out what is to be.
    template <class T>
    [[nodiscard]] taskvec::module_match line_up(
        taskvec::adapter_contents<T>& read, const settings& how, const run_options& run);
    template <class T>
    void add(taskvec::adapter_contents<T>& read, const taskvec::module_match& match, const task_argument& argument,
        const settings& how, const run_options& run);
    template <class T>
    void call_as_files_do(
        taskvec::adapter_contents<T>& read, const nlohmann::json& config, const run_options& run) const;
    template <class T>
    void join_copies(taskvec::adapter_contents<T>& read, const tied_matrix& tie, const std::string& base_label) const;
    [[noreturn]] static void refuse_second(const std::string& tensor, const grown_tensor& grown,
        const std::string& label, std::int64_t rows, const std::string& base_label);
    template <class T>
    void check_saved_modules(const taskvec::adapter_contents<T>& read, const run_options& run) const;
    template <class T>
    void take_grown_vocabulary(taskvec::adapter_contents<T>& read, const taskvec::module_match& match, double weight,
        const std::string& base_label, const run_options& run);
    template <class T>
    void refuse_grown_vocabulary(const taskvec::adapter_contents<T>& read, const taskvec::module_match& match,
        const task_argument& argument, const settings& how) const;
    template <class T>
    void fit_grown_vocabulary(
        taskvec::adapter_contents<T>& read, const taskvec::module_match& match, const std::string& base_label) const;
    template <class T>
    [[nodiscard]] tied_modules untie(taskvec::adapter_contents<T>& read, const settings& how, const run_options& run);
    template <class T>
    void spread_tied(taskvec::adapter_contents<T>& read, const tied_modules& tied, const fs::path& base_path) const;

    taskvec::const_model_ref base_;
    std::deque<taskvec::checkpoint> files_;
    std::deque<adapter> adapters_;
    std::vector<facts> facts_;
    taskvec::adapted_model changes_;
    std::deque<taskvec::peft_tensor> taken_; ///< what took the place of tensors of the base
    std::map<std::string, grown_tensor> grown_; ///< by the base's names
    std::vector<std::string> parted_; ///< modules that were the embedding by other names, and have their own tensors
    bool untied_ = false;
};

} // namespace tool
