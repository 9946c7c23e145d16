"""The small torch model whose adapters tests/data/peft holds, and how PEFT sees their updates."""
# SPDX-License-Identifier: Apache-2.0
import copy

import torch
from transformers.pytorch_utils import Conv1D


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(6, 6)
        self.v_proj = torch.nn.Linear(6, 4, bias=True)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.c_fc = Conv1D(5, 6)  # GPT-2's layer: its weight is in x out


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 6)
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer.attn.q_proj(x) + torch.nn.functional.pad(layer.attn.v_proj(x), (0, 2)) + torch.nn.functional.pad(layer.c_fc(x), (0, 1))
        return self.head(x)

    def get_input_embeddings(self):  # whose weights PEFT stores beside the factors when it is told to
        return self.embed

    def get_output_embeddings(self):
        return None

    def prepare_inputs_for_generation(self, **inputs):  # PEFT asks for it when task_type is CAUSAL_LM
        return inputs


def tiny():
    torch.manual_seed(7)
    return Tiny()


def deltas(peft_model, adapter="default"):
    """{module path in the base model: delta W in the layout of that module's weight}, as PEFT computes it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = {}
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "get_delta_weight") and adapter in module.scaling:
            # A copy in f32: PEFT rounds the product of 16-bit factors back to 16 bits.
            result[name] = copy.deepcopy(module).float().get_delta_weight(adapter).detach().contiguous().clone()
    return result


def load_adapter(folder):
    """A PeftModel of a fresh tiny model with the adapter of `folder`; fails where a tensor of the file has no place."""
    from peft import PeftModel

    model = tiny()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    peft_model = PeftModel.from_pretrained(model, str(folder))
    return peft_model, base
