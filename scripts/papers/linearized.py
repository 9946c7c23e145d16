# SPDX-License-Identifier: Apache-2.0
"""The second paper's full linearization: f(x; θ0) + J(θ − θ0), of all trained layers at once, by torch.func.jvp."""
import os

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

    def parts(self, hidden, mask):
        """f(x; θ0) and J(θ − θ0)."""
        import torch
        return torch.func.jvp(lambda values: torch.func.functional_call(self.model, values, (hidden, mask)), (self.start,), (self.change,))

    def __call__(self, hidden, mask):
        value, tangent = self.parts(hidden, mask)
        return value + tangent


def directions(work, data, model, files, limits):
    """{(task of the texts, split): [f(x; θ0), J τ of each task]}, one row a text: all that a linear combination of task vectors needs."""
    import safetensors.torch
    import torch
    cache = work / "directions.pt"
    if not cache.exists():
        found = {}
        with torch.no_grad():
            for place, file in enumerate(files):
                model.load_state_dict(safetensors.torch.load_file(file))
                for name in data.names:
                    for split in ("validation", "test"):
                        count = min(limits[split], len(data.splits[name, split][0]))
                        rows = found.setdefault((name, split), [None] * (len(files) + 1))
                        value, tangent = torch.empty(count, data.heads[name].shape[1]), torch.empty(count, data.heads[name].shape[1])
                        for places in common.batches_of(data.splits[name, split][0][:count], 64):
                            value[places], tangent[places] = data.through(model.parts, name, split, places)
                        rows[0], rows[place + 1] = value, tangent
        torch.save(found, str(cache) + ".new")
        os.replace(str(cache) + ".new", cache)
    return torch.load(cache, weights_only=True)
