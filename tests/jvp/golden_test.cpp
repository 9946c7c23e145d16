// The operations, a LoRA MLP and a transformer block against torch.func.jvp and torch.func.vjp; tests/data/README.md
// says how the files were made.
// SPDX-License-Identifier: Apache-2.0
#include "../capture.hpp"
#include "../reference/derivatives.hpp"

#if !__has_include(<nlohmann/json.hpp>)
TEST_CASE("golden derivatives need a JSON library, which is not here")
{
    CHECK(true);
}
#else

#include <taskvec/formats/safetensors.hpp>
#include <taskvec/jvp/attention.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/embedding.hpp>
#include <taskvec/jvp/jvp.hpp>
#include <taskvec/jvp/lora_layer.hpp>
#include <taskvec/jvp/loss.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

using namespace taskvec;

namespace {

template <class T>
struct golden_case {
    nlohmann::json options;
    parameters<T> value, tangent, output, output_tangent, cotangent, gradient;
    std::vector<std::int64_t> labels;

    /// Value, tangent and gradients agree to the file's tolerance, relative to the largest expected magnitude, but at
    /// least to 0.1: the gradient of the keys' bias is 0 in exact arithmetic, because softmax does not see a common
    /// shift.
    void check(const char* what, const row_matrix<T>& found, const row_matrix<T>& expected) const
    {
        CAPTURE(std::string(what));
        CHECK(reference::largest_difference(found, expected)
            <= options["tolerance"].get<double>() * std::max(0.1, static_cast<double>(expected.cwiseAbs().maxCoeff())));
    }
    void check_gradients(const parameters<T>& found) const
    {
        for (const auto& [name, expected] : gradient) { check(name.c_str(), found[name], expected); }
    }
    template <class F>
    void check_jvp(const F& f) const
    {
        const auto result = jvp(f, value, tangent);
        check("y", result.primal, output["y"]);
        check("tangent of y", result.tangent, output_tangent["y"]);
    }
};

/// Vectors are stored without their first extent.
template <class T>
row_matrix<T> matrix_of_tensor(const const_tensor_ref& tensor)
{
    const Eigen::Index rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1,
                       cols = tensor.shape.empty() ? 1 : tensor.shape.back();
    row_matrix<T> x(rows, cols);
    std::memcpy(x.data(), tensor.data, tensor.bytes());
    return x;
}

template <class T, class F>
void for_each_case(const char* file_name, const F& f)
{
    const safetensors_file file(std::string(TASKVEC_TEST_DIR "/data/jvp/") + file_name + ".safetensors");
    const std::string suffix = std::same_as<T, double> ? "_f64" : "_f32";
    std::map<std::string, golden_case<T>> cases;
    for (const auto& [path, tensor] : file.model()) {
        const auto first = path.find('/'), second = path.find('/', first + 1);
        const std::string name = path.substr(0, first), part = path.substr(first + 1, second - first - 1),
                          key = path.substr(second + 1);
        if (!name.ends_with(suffix)) { continue; }
        auto& one = cases[name.substr(0, name.size() - 4)];
        one.options = nlohmann::json::parse(file.metadata().at(name));
        if (tensor.dtype == dtype::i64) {
            one.labels.resize(tensor.size());
            std::memcpy(one.labels.data(), tensor.data, tensor.bytes());
            continue;
        }
        const std::map<std::string, parameters<T>*> parts{{"value", &one.value}, {"tangent", &one.tangent},
            {"output", &one.output}, {"output_tangent", &one.output_tangent}, {"cotangent", &one.cotangent},
            {"gradient", &one.gradient}};
        parts.at(part)->insert(key, matrix_of_tensor<T>(tensor));
    }
    CHECK(!cases.empty());
    for (const auto& [name, one] : cases) {
        CAPTURE_BOUND(name);
        f(name, one);
    }
}

template <class T>
void check_operations()
{
    for_each_case<T>("ops", [](const std::string& name, const golden_case<T>& one) {
        const auto& value = one.value;
        const auto unary = [&](const auto& f, const auto& vjp) {
            one.check_jvp([&](const auto& p) { return f(p["x"]); });
            one.check_gradients({{"x", vjp(value["x"], one.cotangent["y"])}});
        };
        if (name == "relu") {
            unary([](const auto& x) { return relu(x); }, [](const auto& x, const auto& dy) { return relu_vjp(x, dy); });
        }
        else if (name == "gelu") {
            unary([](const auto& x) { return gelu(x); }, [](const auto& x, const auto& dy) { return gelu_vjp(x, dy); });
        }
        else if (name == "gelu_tanh") {
            unary([](const auto& x) { return gelu_tanh(x); },
                [](const auto& x, const auto& dy) { return gelu_tanh_vjp(x, dy); });
        }
        else if (name == "silu") {
            unary([](const auto& x) { return silu(x); }, [](const auto& x, const auto& dy) { return silu_vjp(x, dy); });
        }
        else if (name == "sigmoid") {
            unary([](const auto& x) { return sigmoid(x); },
                [](const auto& x, const auto& dy) { return sigmoid_vjp(x, dy); });
        }
        else if (name == "tanh") {
            unary([](const auto& x) { return taskvec::tanh(x); },
                [](const auto& x, const auto& dy) { return tanh_vjp(x, dy); });
        }
        else if (name == "softmax") {
            unary([](const auto& x) { return softmax(x); },
                [](const auto& x, const auto& dy) { return softmax_vjp(softmax(x), dy); });
        }
        else if (name == "layer_norm") {
            const normalization_options options{.epsilon = one.options["eps"]};
            one.check_jvp([&](const auto& p) { return layer_norm(p["x"], p["weight"], p["bias"], options); });
            const auto gradient = layer_norm_vjp(value["x"], value["weight"], one.cotangent["y"], options);
            one.check_gradients({{"x", gradient.x}, {"weight", gradient.gamma}, {"bias", gradient.beta}});
        }
        else if (name == "rms_norm") {
            const normalization_options options{.epsilon = one.options["eps"]};
            one.check_jvp([&](const auto& p) { return rms_norm(p["x"], p["weight"], options); });
            const auto gradient = rms_norm_vjp(value["x"], value["weight"], one.cotangent["y"], options);
            one.check_gradients({{"x", gradient.x}, {"weight", gradient.gamma}});
        }
        else if (name == "attention" || name == "attention_causal") {
            const attention_options options{.causal = one.options["causal"]};
            one.check_jvp([&](const auto& p) { return attention(p["q"], p["k"], p["v"], options); });
            const auto gradient = attention_vjp(value["q"], value["k"], value["v"], one.cotangent["y"], options);
            one.check_gradients({{"q", gradient.q}, {"k", gradient.k}, {"v", gradient.v}});
        }
        else if (name == "embedding") {
            one.check_jvp([&](const auto& p) { return embedding(p["weight"], one.labels); });
            one.check_gradients({{"weight", embedding_vjp(one.cotangent["y"], one.labels, value["weight"].rows())}});
        }
        else if (name == "cross_entropy") {
            const auto [loss, slope] =
                jvp([&](const auto& p) { return cross_entropy(p["x"], one.labels); }, value, one.tangent);
            one.check("loss", reference::matrix_of(loss), one.output["loss"]);
            one.check("tangent of loss", reference::matrix_of(slope), one.output_tangent["loss"]);
            one.check_gradients({{"x", cross_entropy_vjp(value["x"], one.labels, one.cotangent["loss"](0, 0))}});
        }
        else {
            FAIL("no test for the stored operation ", name);
        }
    });
}

/// A layer with an adapter: `prefix`.weight, .bias, .lora_A, .lora_B. Adds its gradients, returns the input's.
template <class T>
row_matrix<T> adapted_vjp(const parameters<T>& p, const std::string& prefix, T scale, const row_matrix<T>& x,
    const row_matrix<T>& dy, parameters<T>& gradients)
{
    const lora_layer<T> layer(
        p[prefix + "weight"], p[prefix + "bias"], make_lora(p[prefix + "lora_B"], p[prefix + "lora_A"], scale));
    row_matrix<T> hidden;
    (void)layer.forward(x, hidden);
    auto low_rank = layer.vjp(x, hidden, dy);
    auto dense = linear_vjp(x, p[prefix + "weight"], dy, {.x = false});
    gradients.insert(prefix + "weight", dense.w);
    gradients.insert(prefix + "bias", dense.bias);
    gradients.insert(prefix + "lora_A", low_rank.a);
    gradients.insert(prefix + "lora_B", low_rank.b);
    return low_rank.x;
}
template <class T>
row_matrix<T> dense_vjp(const parameters<T>& p, const std::string& prefix, const row_matrix<T>& x,
    const row_matrix<T>& dy, parameters<T>& gradients)
{
    auto gradient = linear_vjp(x, p[prefix + "weight"], dy);
    gradients.insert(prefix + "weight", gradient.w);
    gradients.insert(prefix + "bias", gradient.bias);
    return gradient.x;
}
template <class P, class X, class T>
auto adapted(const P& p, const std::string& prefix, const X& x, T scale)
{
    return lora_linear(x, p[prefix + "weight"], p[prefix + "bias"], p[prefix + "lora_A"], p[prefix + "lora_B"], scale);
}

template <class T>
void check_mlp()
{
    for_each_case<T>("lora_mlp", [](const std::string&, const golden_case<T>& one) {
        const T scale = one.options["scale"];
        const auto network = [&](const auto& p) {
            return adapted(p, "1.", gelu(adapted(p, "0.", p["x"], scale)), scale);
        };
        one.check_jvp(network);
        const auto [loss, slope] =
            jvp([&](const auto& p) { return cross_entropy(network(p), one.labels); }, one.value, one.tangent);
        one.check("loss", reference::matrix_of(loss), one.output["loss"]);
        one.check("tangent of loss", reference::matrix_of(slope), one.output_tangent["loss"]);
        const auto& p = one.value;
        const row_matrix<T> before = adapted(p, "0.", p["x"], scale), hidden = gelu(before),
                            logits = adapted(p, "1.", hidden, scale);
        const row_matrix<T> dy =
            one.cotangent["y"] + cross_entropy_vjp(logits, one.labels, one.cotangent["loss"](0, 0));
        parameters<T> gradients;
        const row_matrix<T> d_hidden = adapted_vjp(p, "1.", scale, hidden, dy, gradients);
        gradients.insert("x", adapted_vjp(p, "0.", scale, p["x"], gelu_vjp(before, d_hidden), gradients));
        one.check_gradients(gradients);
    });
}

template <class T>
void check_block()
{
    for_each_case<T>("transformer_block", [](const std::string&, const golden_case<T>& one) {
        const T scale = one.options["scale"];
        const normalization_options norm{.epsilon = one.options["eps"]};
        const attention_options heads{.heads = one.options["heads"], .causal = one.options["causal"]};
        const auto dense = [](const auto& p, const std::string& prefix, const auto& x) {
            return linear(x, p[prefix + "weight"], p[prefix + "bias"]);
        };
        one.check_jvp([&](const auto& p) {
            const auto n = layer_norm(p["x"], p["ln1.weight"], p["ln1.bias"], norm);
            const auto mixed = attention(
                adapted(p, "attn.q.", n, scale), dense(p, "attn.k.", n), adapted(p, "attn.v.", n, scale), heads);
            const auto h = add(p["x"], dense(p, "attn.o.", mixed));
            return add(h,
                dense(p, "mlp.down.", gelu(dense(p, "mlp.up.", layer_norm(h, p["ln2.weight"], p["ln2.bias"], norm)))));
        });
        const auto& p = one.value;
        const row_matrix<T> x = p["x"], n1 = layer_norm(x, p["ln1.weight"], p["ln1.bias"], norm),
                            q = adapted(p, "attn.q.", n1, scale), k = dense(p, "attn.k.", n1),
                            v = adapted(p, "attn.v.", n1, scale), mixed = attention(q, k, v, heads),
                            h = add(x, dense(p, "attn.o.", mixed)),
                            n2 = layer_norm(h, p["ln2.weight"], p["ln2.bias"], norm), up = dense(p, "mlp.up.", n2),
                            dy = one.cotangent["y"];
        parameters<T> gradients;
        const row_matrix<T> d_up = gelu_vjp(up, dense_vjp(p, "mlp.down.", row_matrix<T>(gelu(up)), dy, gradients));
        const auto d_n2 = layer_norm_vjp(h, p["ln2.weight"], dense_vjp(p, "mlp.up.", n2, d_up, gradients), norm);
        const row_matrix<T> d_h = dy + d_n2.x;
        const auto d_attention = attention_vjp(q, k, v, dense_vjp(p, "attn.o.", mixed, d_h, gradients), heads);
        const row_matrix<T> d_n1 = adapted_vjp(p, "attn.q.", scale, n1, d_attention.q, gradients)
            + dense_vjp(p, "attn.k.", n1, d_attention.k, gradients)
            + adapted_vjp(p, "attn.v.", scale, n1, d_attention.v, gradients);
        const auto d_x = layer_norm_vjp(x, p["ln1.weight"], d_n1, norm);
        gradients.insert("ln1.weight", d_x.gamma);
        gradients.insert("ln1.bias", d_x.beta);
        gradients.insert("ln2.weight", d_n2.gamma);
        gradients.insert("ln2.bias", d_n2.beta);
        gradients.insert("x", d_h + d_x.x);
        one.check_gradients(gradients);
    });
}

} // namespace

TEST_CASE("golden: every operation, f64")
{
    check_operations<double>();
}
TEST_CASE("golden: every operation, f32")
{
    check_operations<float>();
}
TEST_CASE("golden: a LoRA MLP and its loss, f64")
{
    check_mlp<double>();
}
TEST_CASE("golden: a LoRA MLP and its loss, f32")
{
    check_mlp<float>();
}
TEST_CASE("golden: a transformer block with LoRA, f64")
{
    check_block<double>();
}
TEST_CASE("golden: a transformer block with LoRA, f32")
{
    check_block<float>();
}

#endif
