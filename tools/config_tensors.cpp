// What the tensors of models say that a configuration does not.
// SPDX-License-Identifier: Apache-2.0
#include "config_tensors.hpp"

#include "scoring.hpp"
#include "words.hpp"

#include <algorithm>
#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace tool::configuration {

namespace {

/// A tensor of a model's files.
struct stored_tensor {
    std::string name;
    taskvec::dtype dtype{};
    taskvec::extents shape;
    bool quantised = false;
};

/// What transformers once stored beside the weights, and makes by itself: the end of its name, as a pattern, where a
/// tensor is one; else empty. mergekit passes over all that its architectures do not name.
std::string buffer_pattern(const stored_tensor& tensor)
{
    const auto ends = [&](const std::string& with) { return tensor.name == with || tensor.name.ends_with("." + with); };
    for (const std::string name : {"rotary_emb.inv_freq", "embeddings.position_ids"}) {
        if (ends(name)) { return "(^|\\.)" + escaped(name) + "$"; }
    }
    for (const std::string name : {"attn", "attention"}) {
        const auto& shape = tensor.shape;
        const bool mask = shape.size() == 4 && shape[0] == 1 && shape[1] == 1 && shape[2] == shape[3];
        if (mask && ends(name + ".bias")) { return "(^|\\.)" + name + "\\.bias$"; }
        if (shape.empty() && ends(name + ".masked_bias")) { return "(^|\\.)" + name + "\\.masked_bias$"; }
    }
    return "";
}

/// The dtype that holds the numbers of both, as PyTorch has it.
taskvec::dtype promoted(taskvec::dtype a, taskvec::dtype b)
{
    if (a == b) { return a; }
    return a == taskvec::dtype::f64 || b == taskvec::dtype::f64 ? taskvec::dtype::f64 : taskvec::dtype::f32;
}

bool is_float(taskvec::dtype type)
{
    using dtype = taskvec::dtype;
    return type == dtype::f64 || type == dtype::f32 || type == dtype::f16 || type == dtype::bf16;
}

/// What a tensor of a model is called in the result, which has the model's layers from `first` on in this slice;
/// nothing where it is not there.
std::optional<std::string> name_in_result(const slice& part, const std::string& name, std::size_t first)
{
    if (!part.part) { return name; }
    const auto& its = *part.part;
    const auto layer = layer_of(name);
    if (!layer) { return its.holds(name) ? std::optional(name) : std::nullopt; }
    if (layer->second < first || layer->second - first >= its.last - its.first) { return std::nullopt; }
    return in_layer(name, *layer, layer->second - first + its.first);
}

class tensors_reader {
public:
    explicit tensors_reader(reading& it)
        : slices_(it.slices)
        , paths_(it.paths())
        , request_(it.request())
    { }

    void read()
    {
        leave_buffers_out();
        promote();
    }

private:
    /// The tensors of a model; none where it cannot be opened, which is said when it is merged.
    const std::vector<stored_tensor>& tensors_of(const std::string& path)
    {
        const auto place = tensors_.find(path);
        if (place != tensors_.end()) { return place->second; }
        auto& list = tensors_[path];
        try {
            const bool lenient = request_.index == "lenient";
            const auto model =
                open_guarded(path, lenient ? taskvec::index_check::lenient : taskvec::index_check::strict);
            for (const auto& [name, tensor] : model.model()) {
                list.push_back({name, tensor.dtype, tensor.shape, tensor.source != nullptr});
            }
        }
        catch (const taskvec::error&) {
            list.clear();
        }
        return list;
    }

    /// Calls `f` with the path of each model, and each of its tensors that is in the result, under the name there.
    template <class Function>
    void each_tensor(const Function& f)
    {
        const auto look = [&](const slice& part, const std::string& path, std::size_t first) {
            for (const auto& tensor : tensors_of(path)) {
                if (const auto name = name_in_result(part, tensor.name, first)) { f(path, *name, tensor); }
            }
        };
        for (const auto& part : slices_) {
            if (!part.part && !request_.base.empty()) { look(part, request_.base, 0); }
            if (part.base) { look(part, part.base->path, part.base->first); }
            for (const auto& one : part.inputs) { look(part, one.path, one.first); }
        }
    }

    /// Buffers that one model has and another lacks take no part.
    void leave_buffers_out()
    {
        const auto has_some = [&](const std::string& path) {
            const auto& list = tensors_of(path);
            return std::any_of(
                list.begin(), list.end(), [](const stored_tensor& one) { return !buffer_pattern(one).empty(); });
        };
        if (std::none_of(paths_.begin(), paths_.end(), has_some)) { return; }
        struct kind_of_buffer {
            std::string first;
            std::set<std::string> models{};
        };
        std::map<std::string, kind_of_buffer> found;
        each_tensor([&](const std::string& path, const std::string& name, const stored_tensor& tensor) {
            const auto kind = buffer_pattern(tensor);
            if (!kind.empty()) { found.try_emplace(kind, kind_of_buffer{name}).first->second.models.insert(path); }
        });
        for (const auto& [kind, what] : found) {
            if (what.models.size() == paths_.size()) { continue; }
            request_.exclude.push_back(kind);
            note(request_.run,
                "'" + what.first + "' and its like are not in every model and are no weights: they take no part");
        }
    }

    /// Whether numbers of the models have several dtypes. Not where layers are quantised.
    [[nodiscard]] bool dtypes_differ()
    {
        std::set<taskvec::dtype> all;
        for (const auto& path : paths_) {
            for (const auto& tensor : tensors_of(path)) {
                if (tensor.quantised) { return false; }
                if (is_float(tensor.dtype)) { all.insert(tensor.dtype); }
            }
        }
        return all.size() > 1;
    }

    /// The dtype that a tensor has in the first model that has it, and the one that holds those of all.
    struct dtypes {
        taskvec::dtype own, wanted;
    };
    /// Of tensors of numbers, by their names in the result.
    [[nodiscard]] std::map<std::string, dtypes> dtypes_of_result()
    {
        std::map<std::string, dtypes> result;
        each_tensor([&](const std::string&, const std::string& name, const stored_tensor& tensor) {
            if (!is_float(tensor.dtype)) { return; }
            const auto [place, is_new] = result.try_emplace(name, dtypes{tensor.dtype, tensor.dtype});
            if (!is_new) { place->second.wanted = promoted(place->second.wanted, tensor.dtype); }
        });
        return result;
    }

    /// Without a dtype mergekit merges each tensor in one that holds those of all models.
    void promote()
    {
        if (!request_.dtype.empty() || !dtypes_differ()) { return; }
        const auto result = dtypes_of_result();
        const auto other = std::find_if(
            result.begin(), result.end(), [](const auto& one) { return one.second.own != one.second.wanted; });
        if (other == result.end()) { return; }
        std::set<taskvec::dtype> wanted;
        for (const auto& one : result) { wanted.insert(one.second.wanted); }
        if (wanted.size() == 1) {
            const std::string word(taskvec::to_string(*wanted.begin()));
            note(request_.run,
                "no dtype is given, and models differ in theirs: the result is " + word + ", which holds all of them");
            request_.dtype = lower_case(word);
            return;
        }
        note(request_.run,
            taskvec::message("no dtype is given, and models differ in theirs: '", other->first, "' is ",
                taskvec::to_string(other->second.own), " in the result, ", taskvec::to_string(other->second.wanted),
                " where mergekit merges; dtype or out_dtype says which"));
    }

    const std::vector<slice>& slices_;
    const std::vector<std::string> paths_;
    merge_request& request_;
    std::map<std::string, std::vector<stored_tensor>> tensors_; ///< by path
};

} // namespace

void look_at_tensors(reading& it)
{
    tensors_reader(it).read();
}

} // namespace tool::configuration
