// Modules of adapters and the weights of a base that they mean: names that are told apart, and what does not fit.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/adapter_names.hpp>

#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace adapter_names_test {

using namespace taskvec;

/// A base of zeros.
class zeros {
public:
    zeros(std::initializer_list<std::pair<const std::string, extents>> weights)
        : zeros(of(weights))
    { }
    static zeros of(const std::map<std::string, extents>& weights)
    {
        zeros made;
        for (const auto& [name, shape] : weights) { made.model_.insert(name, {room(), dtype::f32, shape, {}}); }
        return made;
    }
    operator const const_model_ref&() const { return model_; }
    const const_model_ref& model() const { return model_; }

private:
    zeros() = default;
    static const void* room()
    {
        static const std::vector<float> values(4096);
        return values.data();
    }
    const_model_ref model_;
};
zeros base_of(const std::vector<std::string>& names)
{
    std::map<std::string, extents> weights;
    for (const auto& name : names) { weights[name] = {0, 0}; }
    return zeros::of(weights);
}
module_match match_of(const std::vector<std::string>& modules, const const_model_ref& base,
    adapter_dialect dialect = adapter_dialect::peft)
{
    return match_modules(modules, base, dialect);
}
std::string matched(const std::string& module, const const_model_ref& base, adapter_dialect dialect)
{
    const auto match = match_of({module}, base, dialect);
    return match.tensors.contains(module) ? match.tensors.at(module) : "";
}

void says(const std::string& found, const std::string& words)
{
    CHECK_MESSAGE(found.find(words) != std::string::npos, found);
}
std::string problem_of(const std::function<void()>& call)
{
    try {
        call();
    }
    catch (const error& problem) {
        return problem.what();
    }
    return "nothing";
}

TEST_CASE("a tensor that comes whole goes where its module goes, behind the same prefix, or to its own name")
{
    const auto base = base_of({"model.a.weight", "model.a.bias", "model.b.weight", "model.c.norm", "model.d.weight"});
    const auto match = match_of({"a", "b"}, base);
    CHECK(match.tensors.at("a") == "model.a.weight");
    CHECK(match.prefixes == std::vector<std::pair<std::string, std::string>>{{"", "model."}});
    CHECK(match.renamed("a.bias", base) == "model.a.bias"); // of a module that is matched
    CHECK(match.renamed("c.norm", base) == "model.c.norm"); // by the prefix
    CHECK(match.renamed("model.d.weight", base) == "model.d.weight"); // as it is
    for (const char* none : {"e.norm", "weight", "other.c.norm"}) { CHECK(match.renamed(none, base) == none); }
    auto turned = match;
    turned.tensors["e"] = "model.e.gate_up_proj"; // of several modules, which have no biases of their own
    CHECK(turned.renamed("e.bias", base) == "e.bias");
    // Wrappers in the names of either.
    CHECK(match.renamed("_orig_mod.model.d.weight", base) == "model.d.weight");
    const auto wrapped = base_of({"model._orig_mod.a.weight", "model._orig_mod.a.bias", "model._orig_mod.n.norm"});
    const auto through = match_of({"model.a"}, wrapped);
    CHECK(through.tensors.at("model.a") == "model._orig_mod.a.weight");
    says(through.changes.back(), "segments of wrappers");
    CHECK(through.renamed("model.n.norm", wrapped) == "model._orig_mod.n.norm");
    CHECK(through.renamed("model.m.norm", wrapped) == "model.m.norm");
    const auto unwrapped = match_of({"_orig_mod.model.a"}, base);
    CHECK(unwrapped.tensors.at("_orig_mod.model.a") == "model.a.weight");
    const auto both = match_of({"_orig_mod.a"}, base_of({"_orig_mod.a.weight"}));
    CHECK(both.changes.empty());
    // Where names without wrappers are not their own, wrappers are names as others are.
    CHECK(match_of({"a", "_orig_mod.a"}, base_of({"a.weight", "_orig_mod.a.weight"})).tensors.at("_orig_mod.a")
        == "_orig_mod.a.weight");
    CHECK(match_of({"a"}, base_of({"a.weight", "_orig_mod.a.weight"})).tensors.at("a") == "a.weight");
    // What is doubtful is so behind wrappers too, under the names of the base.
    const auto doubtful = match_of({"q"}, base_of({"x._orig_mod.q.weight", "y._orig_mod.q.weight"}));
    CHECK(doubtful.unmatched == std::vector<std::string>{"q"});
    CHECK(doubtful.doubtful.at("q") == std::vector<std::string>{"x._orig_mod.q.weight", "y._orig_mod.q.weight"});
    const auto flat =
        match_of({"lora_unet_q"}, base_of({"x._orig_mod.q.weight", "y._orig_mod.q.weight"}), adapter_dialect::kohya);
    CHECK(flat.doubtful.at("lora_unet_q") == std::vector<std::string>{"x._orig_mod.q.weight", "y._orig_mod.q.weight"});
    const auto unet = base_of({"_orig_mod.down_blocks.0.resnets.0.conv1.weight", "_orig_mod.conv_in.weight"});
    const auto diffusion = match_of({"lora_unet_input_blocks_0_0"}, unet, adapter_dialect::kohya);
    CHECK(diffusion.diffusion.at("lora_unet_input_blocks_0_0").tensor == "_orig_mod.conv_in.weight");
}

TEST_CASE("underscores are read as dots only where one name has them there")
{
    const auto kohya = adapter_dialect::kohya;
    CHECK(matched("lora_unet_a_fc1", base_of({"m.a.fc1.weight", "m.xa.fc1.weight"}), kohya) == "m.a.fc1.weight");
    CHECK(matched("lora_unet_fc1", base_of({"xfc1.weight", "fc1"}), kohya).empty());
    const auto two = match_of({"lora_unet_a_b"}, base_of({"m.a.b.weight", "n.a_b.weight"}), kohya);
    CHECK(two.unmatched == std::vector<std::string>{"lora_unet_a_b"});
    CHECK(two.doubtful.at("lora_unet_a_b") == std::vector<std::string>{"m.a.b.weight", "n.a_b.weight"});
    // The longest name that the module's ends in, behind words that tell no layer or tower.
    CHECK(matched("lora_te_text_model_a_b_c", base_of({"b.c.weight", "a.b.c.weight", "c.weight"}), kohya)
        == "a.b.c.weight");
    CHECK(matched("lora_te_text_model_xa_b", base_of({"a.b.weight"}), kohya).empty());
    CHECK(matched("lora_te_text_model_a_b_c", base_of({"a.b_c.weight", "a_b.c.weight"}), kohya).empty()); // either
    CHECK(matched("lora_te_my_decoder_a_b", base_of({"a.b.weight"}), kohya).empty()); // a tower
    CHECK(matched("lora_te_text_3_a_b", base_of({"a.b.weight"}), kohya).empty()); // a layer
    CHECK(matched("lora_te_text.model_a_b", base_of({"a.b.weight"}), kohya).empty()); // dots are no underscores
}

TEST_CASE("components and processors are left out, and a prefix never tells another layer or tower")
{
    const auto diffusers = adapter_dialect::diffusers;
    const auto blocks =
        base_of({"blocks.0.attn.to_q.weight", "blocks.0.attn.to_out.0.weight", "blocks.0.to_out.weight"});
    CHECK(matched("transformer.blocks.0.attn.to_q", blocks, diffusers) == "blocks.0.attn.to_q.weight");
    CHECK(matched("transformer.blocks.0.attn.processor.to_q", blocks, diffusers) == "blocks.0.attn.to_q.weight");
    CHECK(matched("blocks.0.attn.processor.to_q", blocks, diffusers) == "blocks.0.attn.to_q.weight");
    CHECK(matched("transformer.blocks.0.attn.to_out", blocks, diffusers) == "blocks.0.attn.to_out.0.weight");
    CHECK(matched("transformer.blocks.0.to_out", blocks, diffusers) == "blocks.0.to_out.weight");
    CHECK(matched("transformer.blocks.1.to_out", blocks, diffusers).empty());
    const auto peft = adapter_dialect::peft;
    CHECK(matched("model.layers.0.q", base_of({"language_model.layers.0.q.weight"}), peft)
        == "language_model.layers.0.q.weight");
    CHECK(matched("model.q", base_of({"encoder.q.weight"}), peft).empty());
    CHECK(matched("my_encoder.q", base_of({"model.q.weight"}), peft).empty());
    CHECK(matched("model.q", base_of({"layers.3.q.weight"}), peft).empty());
    CHECK(matched("layers.3.q", base_of({"model.q.weight"}), peft).empty());
    CHECK(matched("model..q", base_of({"other..q.weight"}), peft) == "other..q.weight");
    CHECK(matched("vision_tower.a.q", base_of({"visual.a.q.weight"}), peft) == "visual.a.q.weight"); // both of images
    CHECK(matched("audio_model.a.q", base_of({"audio_tower.a.q.weight"}), peft) == "audio_tower.a.q.weight");
    CHECK(matched("vision_tower.a.q", base_of({"audio_tower.a.q.weight"}), peft).empty());
    // What one module leaves open, the prefixes of another decide.
    const auto decided = match_of({"q", "model.v"}, base_of({"a.q.weight", "b.q.weight", "b.model.v.weight"}));
    CHECK(decided.tensors.at("model.v") == "b.model.v.weight");
    CHECK(decided.tensors.at("q") == "b.q.weight");
    CHECK(decided.doubtful.empty());
}

/// An adapter of updates of one rank; shapes are out×in.
adapter_contents<float> adapter_of(
    const std::map<std::string, std::pair<std::size_t, std::size_t>>& modules, adapter_dialect dialect = {})
{
    adapter_contents<float> adapter;
    adapter.label = "'it'";
    adapter.dialect = dialect;
    for (const auto& [module, shape] : modules) {
        adapter.modules[module].update = reference::normal_update<float>(shape.first, shape.second, 2, 3);
    }
    return adapter;
}
/// Experts of one parameter.
adapter_contents<float> experts_of(const std::string& parameter, std::size_t count, std::size_t out, std::size_t in)
{
    adapter_contents<float> adapter;
    adapter.label = "'it'";
    const auto dot = parameter.rfind('.');
    for (std::size_t e = 0; e < count; ++e) {
        auto& made = adapter.modules[parameter.substr(0, dot) + "." + std::to_string(e) + parameter.substr(dot)];
        made.update = reference::normal_update<float>(out, in, 2, e);
        made.slice = {parameter, e, count};
    }
    return adapter;
}

TEST_CASE("experts of one parameter become modules where the base has a weight for each")
{
    const std::string mlp = "model.layers.0.mlp.", experts = mlp + "experts.";
    const zeros qwen{{experts + "0.down_proj.weight", {4, 3}}, {experts + "1.down_proj.weight", {4, 3}},
        {mlp + "gate.weight", {2, 3}}};
    const auto names = [](const adapter_contents<float>& adapter) {
        std::vector<std::string> all;
        for (const auto& one : adapter.modules) { all.push_back(one.first); }
        return all;
    };
    auto adapter = experts_of(experts + "gate_up_proj", 2, 6, 3);
    adapter.modules[mlp + "gate"].update = reference::normal_update<float>(2, 3, 1, 9);
    const auto whole = adapter.modules.at(experts + "1.gate_up_proj").update;
    split_experts(adapter, qwen);
    CHECK(names(adapter)
        == std::vector<std::string>{experts + "0.gate_proj", experts + "0.up_proj", experts + "1.gate_proj",
            experts + "1.up_proj", mlp + "gate"});
    for (std::size_t i = 0; i < 3; ++i) {
        CHECK(adapter.modules.at(experts + "1.gate_proj").update.b(i, 0) == whole.b(i, 0));
        CHECK(adapter.modules.at(experts + "1.up_proj").update.b(i, 0) == whole.b(i + 3, 0));
    }
    auto down = experts_of("layers.0.mlp.experts.down_proj", 2, 4, 3);
    split_experts(down, qwen);
    CHECK(names(down)
        == std::vector<std::string>{"layers.0.mlp.experts.0.down_proj", "layers.0.mlp.experts.1.down_proj"});
    // Mixtral's names, and its router's.
    const zeros mixtral{{"model.layers.0.block_sparse_moe.experts.0.w1.weight", {4, 3}},
        {"model.layers.0.block_sparse_moe.gate.weight", {2, 3}}};
    auto sparse = experts_of(experts + "gate_up_proj", 1, 6, 3);
    sparse.modules[mlp + "gate"].update = reference::normal_update<float>(2, 3, 1, 9);
    split_experts(sparse, mixtral);
    const std::string moe = "model.layers.0.block_sparse_moe.";
    CHECK(names(sparse) == std::vector<std::string>{moe + "experts.0.w1", moe + "experts.0.w3", moe + "gate"});
    // A base that has the parameter itself is left alone.
    auto same = experts_of(experts + "down_proj", 2, 4, 3);
    split_experts(same, zeros{{experts + "down_proj", {2, 4, 3}}});
    CHECK(same.modules.begin()->second.slice.count == 2);
    // What does not fit is refused by the parameter's name.
    says(problem_of([&] {
        auto odd = experts_of(experts + "gate_up_proj", 2, 5, 3);
        split_experts(odd, qwen);
    }),
        "parameter 'model.layers.0.mlp.experts.gate_up_proj' of 'it' has 5 outputs");
    says(problem_of([&] {
        auto few = experts_of(experts + "down_proj", 1, 4, 3);
        split_experts(few, qwen);
    }),
        "parameter 'model.layers.0.mlp.experts.down_proj' of 'it' is of 1 experts, and the base has more");
    says(problem_of([&] {
        auto few = experts_of("x.layers.0.mlp.experts.down_proj", 1, 4, 3);
        split_experts(few, qwen);
    }),
        "of 1 experts, and the base has more");
    CHECK(problem_of([&] {
        auto elsewhere = experts_of("mlp.experts.down_proj", 1, 4, 3); // in no layer
        split_experts(elsewhere, qwen);
    }) == "nothing");
    // The same experts are matched as parameters where the base has them so.
    const zeros stacked{{experts + "down_proj", {2, 4, 3}}, {experts + "down_proj.weight", {1}}};
    const auto match = match_modules(experts_of(experts + "down_proj", 2, 4, 3), stacked);
    CHECK(match.tensors.at(experts + "1.down_proj") == experts + "down_proj");
    CHECK(match_modules(experts_of("other.experts.down_proj", 1, 4, 3), zeros{{"m.weight", {1}}}).unmatched
        == std::vector<std::string>{"other.experts.down_proj"});
}

TEST_CASE("what MLX's configuration says is held against the base")
{
    const zeros base(
        {{"model.layers.0.q.weight", {4, 3}}, {"model.layers.1.q.weight", {4, 3}}, {"model.layers.1.v.weight", {4, 3}},
            {"model.layers.1.q.bias", {4}}, {"visual.layers.5.q.weight", {4, 3}}, {"lm_head.weight", {4, 3}}});
    const auto problem = [&](const char* config, const std::vector<std::string>& modules,
                             adapter_dialect dialect = adapter_dialect::mlx,
                             std::optional<std::int64_t> counted = std::nullopt) {
        adapter_contents<float> adapter = adapter_of({}, dialect);
        adapter.config = nlohmann::json::parse(config);
        module_match match;
        for (const auto& module : modules) {
            adapter.modules[module].update = reference::normal_update<float>(4, 3, 2, 3);
            match.tensors[module] = module + ".weight";
        }
        return problem_of([&] { check_mlx_base(adapter, base, match, "the base", counted); });
    };
    const std::string last = "model.layers.1.q", first = "model.layers.0.q";
    CHECK(problem(R"({"num_layers": 1})", {last}) == "nothing");
    CHECK(problem(R"({"num_layers": 1})", {first}, adapter_dialect::peft) == "nothing"); // nobody reads it there
    says(problem(R"({"num_layers": 1})", {first}), "MLX applies those of the last 1 of the 2 layers of the base alone");
    says(problem(R"({"num_layers": 3})", {last}), "num_layers is 3, and the base has 2 layers");
    CHECK(problem(R"({"num_layers": 2})", {last}) == "nothing");
    CHECK(problem(R"({"num_layers": 1})", {"lm_head"}) == "nothing");
    CHECK(problem(R"({"num_layers": 6})", {"lm_head"}) == "nothing"); // the longest list has so many
    says(problem(R"({"num_layers": 7})", {"lm_head"}), "num_layers is 7, and the base has 6 layers");
    says(problem(R"({"num_layers": 2})", {"lm_head"}, adapter_dialect::mlx, 1), "num_layers is 2, and the base has 1");
    CHECK(problem(R"({"num_layers": 6})", {"lm_head"}, adapter_dialect::mlx, 0) == "nothing"); // which counts nothing
    // Keys that name what the base has and the adapter has nothing of.
    says(problem(R"({"lora_parameters": {"keys": ["q", "v"]}})", {last}),
        "names 'v', which the base has as 'model.layers.1.v'");
    CHECK(problem(R"({"lora_parameters": {"keys": ["q", "k"]}})", {last}) == "nothing"); // nobody has k
    says(problem(R"({"lora_parameters": {"keys": ["q"]}})", {"lm_head"}), "names 'q', which the base has as");
    CHECK(problem(R"({"num_layers": 1, "lora_parameters": {"keys": ["model.layers.1.q"]}})", {last}) == "nothing");
    says(problem(R"({"num_layers": 1, "lora_parameters": {"keys": ["q", "model.layers.0.q"]}})", {last}),
        "names 'model.layers.0.q', which the base has"); // by its whole name, however early
    says(problem(R"({"lora_parameters": {"keys": ["q", "visual.layers.5.q"]}})", {last}),
        "names 'visual.layers.5.q', which the base has"); // in whatever list
}

TEST_CASE("a weight gives a module the kernel that its file does not say, and the sides of an embedding")
{
    const zeros held{{"conv", {4, 3, 1, 3}}, {"line", {4, 3, 3}}, {"table", {3, 4}}, {"square", {4, 4}}};
    const auto of = [&](const char* name) { return *held.model().find(name); };
    auto made = adapter_of({{"m", {4, 9}}}).modules.at("m");
    take_shape(made, of("conv"), adapter_dialect::kohya);
    CHECK(made.kernel.empty()); // of a linear layer, which says so
    for (const char* kind : {"LoHa", "LoKr"}) { // which may be stored flat
        made.kernel.clear();
        made.kind = kind;
        take_shape(made, of("conv"), adapter_dialect::kohya);
        CHECK(made.kernel == extents{1, 3});
    }
    made.kernel = {3, 1}; // a kernel of one side, as of two with an end of 1
    take_shape(made, of("line"), adapter_dialect::kohya);
    CHECK(made.kernel == extents{3});
    auto table = adapter_of({{"m", {4, 3}}}).modules.at("m");
    take_shape(table, of("table"), adapter_dialect::kohya);
    CHECK_FALSE(table.embedding);
    take_shape(table, of("square"), adapter_dialect::mlx);
    CHECK_FALSE(table.embedding);
    take_shape(table, of("table"), adapter_dialect::mlx);
    CHECK(table.embedding);
    auto other = adapter_of({{"m", {3, 4}}}).modules.at("m");
    take_shape(other, of("table"), adapter_dialect::mlx);
    CHECK_FALSE(other.embedding);
    other = adapter_of({{"m", {5, 3}}}).modules.at("m");
    take_shape(other, of("table"), adapter_dialect::mlx);
    CHECK_FALSE(other.embedding);

    const auto problem = [&](std::pair<std::size_t, std::size_t> shape, const const_tensor_ref& to,
                             const std::function<void(adapted_module<float>&)>& change = {}, bool may_grow = false,
                             std::size_t blocks = 1) {
        auto one = adapter_of({{"m", shape}}).modules.at("m");
        if (change) { change(one); }
        return problem_of([&] {
            check_shape(
                one, to, {.tensor = "t", .module = "m", .label = "'it'", .blocks = blocks, .may_grow = may_grow});
        });
    };
    CHECK(problem({3, 4}, of("table")) == "nothing");
    CHECK(problem({4, 3}, of("table")) == "nothing"); // either way round
    says(problem({3, 5}, of("table")), "tensor 't' has shape [3, 4], and the update of module 'm' in 'it' is 3×5");
    says(problem({5, 4}, of("table")), "is 5×4");
    CHECK(problem({5, 4}, of("table"), {}, true) == "nothing"); // rows of new tokens
    CHECK(problem({4, 5}, of("table"), {}, true) == "nothing");
    says(problem({2, 4}, of("table"), {}, true), "is 2×4");
    says(problem({4, 2}, of("table"), {}, true), "is 4×2");
    CHECK(problem({1, 4}, of("table"), {}, false, 3) == "nothing"); // one of three, one below the other
    says(problem({4, 9}, of("conv")), "is of shape [4, 9], a linear layer's");
    says(problem({4, 9}, of("conv"), [](auto& m) { m.kernel = {3, 1}; }), "is of shape [4, 3, 3, 1]:");
    says(problem({4, 9}, of("conv"), [](auto& m) { m.kernel = {0, 1}; }), "is of shape [4, 0, 0, 1]:");
    CHECK(problem({4, 9}, of("conv"), [](auto& m) { m.kernel = {1, 3}; }) == "nothing");
    CHECK(problem({4, 9}, of("conv"), [](auto& m) { m.kind = "LoKr"; }) == "nothing");
    const std::vector<std::uint8_t> bytes(64);
    CHECK(problem({9, 9}, {bytes.data(), dtype::u8, {3, 4}}) == "nothing"); // packed: of no shape of its own
    says(problem({9, 9}, {bytes.data(), dtype::f8_e4m3, {3, 4}}), "is 9×9");
}

TEST_CASE("whether linear layers lie in×out is told by those that are not square, and by biases")
{
    const auto match = [](const adapter_contents<float>& adapter) {
        module_match made;
        for (const auto& one : adapter.modules) { made.tensors[one.first] = one.first + ".weight"; }
        return made;
    };
    const auto shown = [&](const zeros& base, const adapter_contents<float>& adapter) {
        return shows_in_by_out(base, adapter, match(adapter));
    };
    const auto denied = [&](const zeros& base, adapter_contents<float> adapter) {
        adapter.fan_in_fan_out = true;
        return denies_fan_in_fan_out(base, adapter, match(adapter));
    };
    const zeros both{{"plain.weight", {4, 3}}, {"turned.weight", {3, 4}}, {"square.weight", {4, 4}},
        {"line.weight", {4}}, {"conv.weight", {4, 3, 1}}};
    const auto of = [](const char* name, std::size_t out = 4, std::size_t in = 3) {
        return adapter_of({{name, {out, in}}});
    };
    CHECK(denied(both, of("plain")));
    CHECK_FALSE(denied(both, of("turned")));
    CHECK_FALSE(denied(both, of("square", 4, 4)));
    CHECK_FALSE(denied(both, of("conv")));
    CHECK_FALSE(denied(both, adapter_of({{"plain", {4, 3}}, {"turned", {4, 3}}})));
    CHECK_FALSE(shown(both, of("plain")));
    CHECK(shown(both, of("turned")));
    CHECK(shown(both, adapter_of({{"plain", {4, 3}}, {"turned", {4, 3}}})));
    auto unmatched = of("plain");
    CHECK_FALSE(shows_in_by_out(both, unmatched, module_match()));
    auto embedding = of("turned");
    embedding.modules.begin()->second.embedding = true;
    CHECK_FALSE(shown(both, embedding));
    CHECK_FALSE(shown(both, of("plain", 5, 2)));
    // All that is adapted is square: biases tell.
    const auto squares = of("square", 4, 4);
    CHECK(shown(zeros{{"square.weight", {4, 4}}, {"a.weight", {3, 4}}, {"a.bias", {4}}}, squares));
    CHECK_FALSE(shown(zeros{{"square.weight", {4, 4}}, {"a.weight", {4, 3}}, {"a.bias", {4}}}, squares));
    CHECK_FALSE(shown(
        zeros{{"square.weight", {4, 4}}, {"a.weight", {3, 4}}, {"a.bias", {4}}, {"b.weight", {4, 3}}, {"b.bias", {4}}},
        squares));
    CHECK_FALSE(shown(zeros{{"square.weight", {4, 4}}, {"a.weight", {3, 4}}, {"a.bias", {4, 1}}, {"b.kernel", {3, 4}},
                          {"b.bias", {4}}, {"c.weight", {3, 4}}, {"d.weight", {3, 4}}, {"d.bias", {5}}},
        squares));
}

TEST_CASE("an adapter that does not belong to a base is refused by module and tensor")
{
    const zeros base{{"a.weight", {4, 3}}, {"b.weight", {4, 3}}, {"square.weight", {4, 4}}, {"x.q.weight", {4, 3}},
        {"y.q.weight", {4, 3}}, {"attn.in_proj_weight", {12, 3}}, {"e.down_proj", {2, 4, 4}},
        {"lm_head.weight", {4, 4}}};
    const auto problem = [&](const adapter_contents<float>& adapter, const adapter_base_traits& traits = {}) {
        return problem_of([&] {
            adapted_model sum;
            add_adapter(sum, base, adapter, match_modules(adapter, base), 1, traits);
        });
    };
    CHECK(problem(adapter_of({{"a", {4, 3}}})) == "nothing");
    says(problem(adapter_of({{"none", {4, 3}}})), "module 'none' of 'it' is no module of the base: use the base");
    says(problem(adapter_of({{"none", {4, 3}}, {"other", {4, 3}}, {"third", {4, 3}}})), ", nor are 2 others clear");
    says(problem(adapter_of({{"q", {4, 3}}})), "module 'q' of 'it' may mean 'x.q.weight' or 'y.q.weight' of the base");
    says(problem(adapter_of({{"attn", {4, 3}}})), "one of PyTorch's MultiheadAttention");
    says(problem(adapter_of({{"none", {4, 3}}}), {.renaming = "--rename"}), "say what it is called there (--rename)");
    says(problem(adapter_of({{"lora_unet_none", {4, 3}}}, adapter_dialect::kohya)), "in the form whose names it has");
    for (const char* module : {"model.diffusion_model.none", "diffusion_model.none"}) {
        says(problem(adapter_of({{module, {4, 3}}})), "in the form whose names it has");
    }
    auto paired = adapter_of({{"a", {4, 3}}});
    paired.modules.at("a").paired_rows = true;
    says(problem(paired), "unpair_rows() first");
    says(problem(adapter_of({{"unet.a", {4, 3}}, {"text_encoder.a", {4, 3}}}, adapter_dialect::diffusers)),
        "may both mean 'a.weight' of the base");
    auto biased = adapter_of({{"a", {4, 3}}});
    biased.modules.at("a").bias.a = matrix<float>(1, 4, matrix_order::row_major);
    biased.modules.at("a").bias.b = matrix<float>(1, 1, matrix_order::row_major);
    says(problem(biased), "the base has no 'a.bias' to add it to");
    // Copies of weights of the base that come with it.
    auto copied = adapter_of({{"a", {4, 3}}});
    copied.copies["b.weight"] = {dtype::f32, {4, 3}, std::vector<std::byte>(48)};
    CHECK(problem(copied) == "nothing");
    copied.copies.at("b.weight").bytes[3] = std::byte{63};
    says(problem(copied), "carries a copy of the weight 'b.weight' that it was trained on");
    CHECK(problem(copied, {.holds_adapter = true}) == "nothing");
    copied.copies.at("b.weight") = {dtype::f32, {3, 4}, std::vector<std::byte>(48)};
    says(problem(copied), "carries a copy of the weight 'b.weight'");
    copied.copies.at("b.weight") = {dtype::bf16, {4, 3}, std::vector<std::byte>(24)}; // rounded: nothing is said
    CHECK(problem(copied) == "nothing");
    copied.copies.clear();
    copied.copies["elsewhere.weight"] = {dtype::f32, {4, 3}, std::vector<std::byte>(48)};
    CHECK(problem(copied) == "nothing");
    // Square matrices of experts, of which nothing says how they lie.
    says(problem(experts_of("e.down_proj", 2, 4, 4)), "nothing says whether 'it' changes its matrices as they lie");
}

TEST_CASE("stacks of experts lie as their two parameters show, or nothing shows it")
{
    const auto lies = [](const extents& both, const extents& down, const std::string& owner = "mlp.experts.") {
        std::map<std::string, extents> weights;
        if (!both.empty()) { weights[owner + "gate_up_proj"] = both; }
        if (!down.empty()) { weights[owner + "down_proj"] = down; }
        return detail::experts_lie_in_by_out(zeros::of(weights), owner + "down_proj");
    };
    CHECK(lies({2, 12, 4}, {2, 4, 6}) == false); // out×in
    CHECK(lies({2, 4, 12}, {2, 6, 4}) == true); // in×out
    CHECK(lies({2, 4, 12}, {2, 6, 4}, "feed_forward.experts.") == false); // as PEFT takes Llama 4's
    for (const auto& [both, down] : std::vector<std::pair<extents, extents>>{{{}, {2, 4, 6}}, {{2, 12, 4}, {}},
             {{12, 4}, {2, 4, 6}}, {{2, 12, 4}, {4, 6}}, {{2, 12, 4}, {2, 4, 5}}, {{2, 11, 4}, {2, 4, 6}},
             {{2, 4, 12}, {2, 6, 5}}, {{2, 4, 11}, {2, 6, 4}}}) {
        CHECK(lies(both, down) == std::nullopt);
    }
    // A weight for each expert, or one for a stack: either way round by its sides.
    const auto place = [](const extents& shape, std::size_t out, std::size_t in, std::size_t count) {
        const zeros base{{"e.down_proj", shape}};
        const auto adapter = experts_of("e.down_proj", count, out, in);
        return detail::place_of_expert(adapter.modules.begin()->second, base.model(), "e.down_proj", "'it'");
    };
    CHECK(place({2, 4, 3}, 4, 3, 2).slices == 2);
    CHECK_FALSE(place({2, 4, 3}, 4, 3, 2).transposed);
    CHECK(place({2, 3, 4}, 4, 3, 2).transposed);
    CHECK(place({4, 3}, 4, 3, 1).slices == 0);
    CHECK(place({4, 3}, 4, 3, 2).slices == 2); // which the base then refuses
    CHECK_FALSE(place({4, 4}, 4, 4, 1).transposed);
    CHECK_FALSE(place({4}, 4, 1, 1).transposed);
}

} // namespace adapter_names_test
