# SPDX-License-Identifier: Apache-2.0
"""The second paper's linearization of the whole network, f(x; θ0) + J(θ − θ0), by torch.func.jvp: of all trained layers, or of LoRA's parameters."""
import json
import pathlib
import shutil

import common


class Linearized:
    """Takes parameters and texts as the network itself does. Its value is linear in the parameters."""

    def __init__(self, settings):
        import torch
        # Forward mode has no rule for the fused attention.
        self.model = common.upper_layers(common.load_encoder(settings["encoder"], attention="eager"), settings["layers"])
        self.start = {key: one.detach().clone() for key, one in self.model.named_parameters()}
        self.change = {key: torch.zeros_like(one) for key, one in self.start.items()}

    def load_state_dict(self, state):
        self.change = {key: state[key] - one for key, one in self.start.items()}

    def state_dict(self):
        return {key: (one + self.change[key].detach()).contiguous() for key, one in self.start.items()}

    def tangents(self):
        """Of the weights that change, at least one."""
        changed = {key: one for key, one in self.change.items() if one.requires_grad or one.any()}
        return changed or dict([next(iter(self.change.items()))])

    def parts(self, hidden, mask):
        """f(x; θ0) and J(θ − θ0)."""
        import torch
        tangents = self.tangents()
        start = {key: self.start[key] for key in tangents}
        return torch.func.jvp(lambda values: torch.func.functional_call(self.model, values, (hidden, mask)), (start,), (tangents,))

    def __call__(self, hidden, mask):
        value, tangent = self.parts(hidden, mask)
        return value + tangent


class LinearizedAdapter(Linearized):
    """The whole network linearized in LoRA's A and B, around an initialisation that PEFT saved. As B0 is 0 there, the derivative by A is 0, and what is left
    is the network's derivative along the weights' changes s·B·A0."""

    def __init__(self, settings, init):
        import safetensors.torch
        import torch
        super().__init__(settings)
        config = json.loads((init / "adapter_config.json").read_text())
        state = safetensors.torch.load_file(init / "adapter_model.safetensors")
        self.scale, self.a, self.b = config["lora_alpha"] / config["r"], {}, {}
        for key in sorted(self.start):
            a = f"base_model.model.{key.removesuffix('.weight')}.lora_A.weight"
            if a in state:
                b = state[a.replace("lora_A", "lora_B")]
                assert not b.any(), "B0 is not 0"
                self.a[key], self.b[key] = state[a], torch.zeros_like(b).requires_grad_()

    def tangents(self):
        return {key: self.scale * b @ self.a[key] for key, b in self.b.items()}

    def save(self, init, folder):
        """An adapter of PEFT: the initialisation's with B as it was trained."""
        import safetensors.torch
        shutil.copytree(init, folder)
        file = pathlib.Path(folder) / "adapter_model.safetensors"
        state = safetensors.torch.load_file(file)
        for key, b in self.b.items():
            state[f"base_model.model.{key.removesuffix('.weight')}.lora_B.weight"] = b.detach().contiguous()
        safetensors.torch.save_file(state, file, {"format": "pt"})


def along(data, model, name, split, limit):
    """f(x; θ0) and J(θ − θ0) of a task's first texts, a row each, of the linearized model as it is loaded."""
    import torch
    count = len(data.splits[name, split][0][:limit])
    value, tangent = (torch.empty(count, data.heads[name].shape[1]) for _ in range(2))
    with torch.no_grad():
        for places in data.batches(name, split, 64, limit):
            value[places], tangent[places] = data.through(model.parts, name, split, places)
    return value, tangent


def directions(cache, data, model, files, limits):
    """{(task of the texts, split): [f(x; θ0), J τ of each task]}, one row a text: all that a linear combination of task vectors needs. `files` gives the tasks'
    models one by one."""
    import safetensors.torch
    import torch
    if not cache.exists():
        found = {}
        for file in files():
            model.load_state_dict(safetensors.torch.load_file(file))
            for name in data.names:
                for split in ("validation", "test"):
                    value, tangent = along(data, model, name, split, limits[split])
                    found.setdefault((name, split), [value]).append(tangent)
        with common.written(cache) as new:
            torch.save(found, new)
    return torch.load(cache, weights_only=True)
