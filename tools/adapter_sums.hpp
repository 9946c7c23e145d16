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

#include <deque>
#include <functional>
#include <string>
#include <string_view>
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

/// Σ weight·(what each adapter does), for a base. Never moves: changes() points into it.
class adapter_sum {
public:
    struct settings {
        fs::path base_path;
        std::function<bool(std::string_view)>
            include{}; ///< modules without a weight in the base that it leaves out are no error
        std::vector<std::string> included{}; ///< the patterns of --include, for the error where nothing is left
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
    template <class T>
    void add(
        taskvec::adapter_contents<T>& read, const task_argument& argument, const settings& how, const run_options& run);
    template <class T>
    void call_as_files_do(
        taskvec::adapter_contents<T>& read, const nlohmann::json& config, const run_options& run) const;
    template <class T>
    void join_copies(taskvec::adapter_contents<T>& read, const tied_matrix& tie, const std::string& base_label) const;
    template <class T>
    void check_saved_modules(const taskvec::adapter_contents<T>& read, const run_options& run) const;
    template <class T>
    void take_grown_vocabulary(taskvec::adapter_contents<T>& read, const taskvec::module_match& match,
        const task_argument& argument, const std::string& base_label, const run_options& run);
    template <class T>
    void refuse_grown_vocabulary(const taskvec::adapter_contents<T>& read, const taskvec::module_match& match,
        const task_argument& argument, const settings& how) const;
    template <class T>
    void untie(taskvec::adapter_contents<T>& read, const settings& how, const run_options& run);

    taskvec::const_model_ref base_;
    std::deque<taskvec::checkpoint> files_;
    std::deque<adapter> adapters_;
    std::vector<facts> facts_;
    taskvec::adapted_model changes_;
    std::deque<taskvec::peft_tensor> taken_; ///< what took the place of tensors of the base
    bool untied_ = false;
};

} // namespace tool
