"""Makes tests/data/jvp: values, forward-mode derivatives and gradients by torch.func of an MLP with LoRA, of a transformer block and of single ops."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import pathlib

import torch
import torch.nn.functional as F

from common import save


class Cases:
    def __init__(self):
        self.tensors, self.metadata = {}, {}

    def add(self, name, function, values, active, generator, options=None):
        """`function` maps a dict of tensors to a dict of tensors; `active` names the ones with a tangent. Stored once in f64, once in f32."""
        tangents64 = {key: torch.randn(values[key].shape, generator=generator, dtype=torch.float64) for key in active}
        for label, dtype in (("f64", torch.float64), ("f32", torch.float32)):
            case = f"{name}_{label}"
            cast = lambda tensors: {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
            primals, tangents = cast(values), cast(tangents64)
            fixed = {key: value for key, value in primals.items() if key not in active}
            moving = {key: primals[key] for key in active}
            outputs, output_tangents = torch.func.jvp(lambda p: function({**fixed, **p}), (moving,), (tangents,))
            again, pull = torch.func.vjp(lambda p: function({**fixed, **p}), moving)
            cotangents = {}
            for key, value in outputs.items():
                assert torch.equal(value, again[key])
                cotangents[key] = torch.cos(torch.arange(value.numel(), dtype=torch.float64)).reshape(value.shape).to(dtype)
            (gradients,) = pull(cotangents)
            # <cotangent, J v> = <J' cotangent, v>
            left = sum((cotangents[key] * output_tangents[key]).sum() for key in outputs)
            right = sum((gradients[key] * tangents[key]).sum() for key in active)
            assert torch.allclose(left, right, rtol=1e-9 if dtype == torch.float64 else 1e-3, atol=1e-9 if dtype == torch.float64 else 1e-3)
            for kind, group in (("value", primals), ("tangent", tangents), ("output", outputs), ("output_tangent", output_tangents),
                                ("cotangent", cotangents), ("gradient", gradients)):
                for key, tensor in group.items():
                    self.tensors[f"{case}/{kind}/{key}"] = tensor
            self.metadata[case] = json.dumps({"active": sorted(active), "agreement": "tolerance", "tolerance": 1e-12 if dtype == torch.float64 else 2e-5,
                                              **(options or {})})

    def write(self, path):
        save(path, self.tensors, {"made_with": f"torch {torch.__version__.split('+')[0]}", "cases": json.dumps(sorted(self.metadata)),
                                  **dict(sorted(self.metadata.items()))})


def normal(generator, *shape, scale=1.0):
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def lora_mlp(path):
    generator = torch.Generator().manual_seed(101)
    scale = 1.5
    values = {"x": normal(generator, 5, 6)}
    for layer, (inner, outer) in {"0": (6, 8), "1": (8, 3)}.items():
        values[f"{layer}.weight"] = normal(generator, outer, inner, scale=inner**-0.5)
        values[f"{layer}.bias"] = normal(generator, outer, scale=0.1)
        values[f"{layer}.lora_A"] = normal(generator, 2, inner, scale=inner**-0.5)
        values[f"{layer}.lora_B"] = normal(generator, outer, 2, scale=0.5)
    values["labels"] = torch.tensor([0, 2, 1, 1, 0])

    def linear(p, layer, x):
        return F.linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"]) + scale * F.linear(F.linear(x, p[f"{layer}.lora_A"]), p[f"{layer}.lora_B"])

    def model(p):
        y = linear(p, "1", F.gelu(linear(p, "0", p["x"])))
        return {"y": y, "loss": F.cross_entropy(y, p["labels"])}

    adapters = [key for key in values if "lora" in key]
    cases, options = Cases(), {"scale": scale}
    cases.add("adapters", model, values, adapters, generator, options)
    cases.add("everything", model, values, [key for key in values if key != "labels"], generator, options)
    at_start = {key: torch.zeros_like(value) if key.endswith("lora_B") else value for key, value in values.items()}
    cases.add("adapters_b_zero", model, at_start, adapters, generator, options)
    cases.write(path)


def transformer_block(path):
    generator = torch.Generator().manual_seed(102)
    width, heads, hidden, length, scale = 8, 2, 12, 4, 2.0
    values = {"x": normal(generator, length, width)}
    for name in ("ln1", "ln2"):
        values[f"{name}.weight"] = 1 + normal(generator, width, scale=0.1)
        values[f"{name}.bias"] = normal(generator, width, scale=0.1)
    for name, (inner, outer) in {"attn.q": (width, width), "attn.k": (width, width), "attn.v": (width, width), "attn.o": (width, width),
                                 "mlp.up": (width, hidden), "mlp.down": (hidden, width)}.items():
        values[f"{name}.weight"] = normal(generator, outer, inner, scale=inner**-0.5)
        values[f"{name}.bias"] = normal(generator, outer, scale=0.1)
    for name in ("attn.q", "attn.v"):
        values[f"{name}.lora_A"] = normal(generator, 2, width, scale=width**-0.5)
        values[f"{name}.lora_B"] = normal(generator, width, 2, scale=0.5)

    def linear(p, name, x):
        y = F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])
        return y + scale * F.linear(F.linear(x, p[f"{name}.lora_A"]), p[f"{name}.lora_B"]) if f"{name}.lora_A" in p else y

    def block(causal):
        def model(p):
            x = p["x"]
            z = F.layer_norm(x, (width,), p["ln1.weight"], p["ln1.bias"], 1e-5)
            q, k, v = (linear(p, f"attn.{part}", z).reshape(length, heads, width // heads).transpose(0, 1) for part in "qkv")
            scores = q @ k.transpose(1, 2) * (width // heads) ** -0.5
            if causal:
                scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
            mixed = (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(length, width)
            h = x + linear(p, "attn.o", mixed)
            z = F.layer_norm(h, (width,), p["ln2.weight"], p["ln2.bias"], 1e-5)
            return {"y": h + linear(p, "mlp.down", F.gelu(linear(p, "mlp.up", z)))}

        return model

    adapters = [key for key in values if "lora" in key]
    cases = Cases()
    for causal in (False, True):
        options = {"heads": heads, "scale": scale, "causal": causal, "eps": 1e-5}
        label = "causal" if causal else "full"
        cases.add(f"adapters_{label}", block(causal), values, adapters, generator, options)
        cases.add(f"everything_{label}", block(causal), values, list(values), generator, options)
    cases.write(path)


def ops(path):
    generator = torch.Generator().manual_seed(103)
    x = normal(generator, 3, 7, scale=2.0)
    x[0, 0] = 0.0
    weight, bias = 1 + normal(generator, 7, scale=0.2), normal(generator, 7, scale=0.2)
    cases = Cases()
    single = {
        "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
        "softmax": lambda v: torch.softmax(v, -1),
    }
    for name, op in single.items():
        cases.add(name, lambda p, op=op: {"y": op(p["x"])}, {"x": x}, ["x"], generator)
    cases.add("layer_norm", lambda p: {"y": F.layer_norm(p["x"], (7,), p["weight"], p["bias"], 1e-5)}, {"x": x, "weight": weight, "bias": bias},
              ["x", "weight", "bias"], generator, {"eps": 1e-5})
    cases.add("rms_norm", lambda p: {"y": F.rms_norm(p["x"], (7,), p["weight"], 1e-6)}, {"x": x, "weight": weight}, ["x", "weight"], generator, {"eps": 1e-6})
    cases.add("cross_entropy", lambda p: {"loss": F.cross_entropy(p["x"], p["labels"])}, {"x": x, "labels": torch.tensor([6, 0, 3])}, ["x"], generator)
    for causal in (False, True):
        cases.add("attention_causal" if causal else "attention", lambda p, causal=causal: {"y": F.scaled_dot_product_attention(
            p["q"][None], p["k"][None], p["v"][None], is_causal=causal)[0]},
            {"q": normal(generator, 4, 6), "k": normal(generator, 4, 6), "v": normal(generator, 4, 5)}, ["q", "k", "v"], generator, {"causal": causal})
    cases.add("embedding", lambda p: {"y": F.embedding(p["ids"], p["weight"])}, {"ids": torch.tensor([2, 0, 2, 4]), "weight": normal(generator, 5, 3)}, ["weight"], generator)
    cases.write(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "jvp"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.backends.cuda.enable_flash_sdp(False)
    for name, make in {"lora_mlp": lora_mlp, "transformer_block": transformer_block, "ops": ops}.items():
        make(out / f"{name}.safetensors")
        print(f"  {name}: {(out / f'{name}.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main()
