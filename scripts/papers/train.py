# SPDX-License-Identifier: Apache-2.0
"""Trains a model of every task: fully, fully linearized, with LoRA of two ranks, and with LoRA linearized per layer. What is there already stays."""
import argparse
import os
import pathlib
import shutil
import time
import warnings

import common
import linearized
import tasks as task_lists

# As the first paper has them (full, LoRA of rank 128) and the second (full, LoRA of rank 16, L-LoRA layer by layer and of the whole network, and full linearization).
PARADIGMS = {"full": {"rate": 1e-4}, "linearized": {"rate": 1e-4}, "lora128": {"rank": 128, "alpha": 128, "rate": 1e-3}, "lora16": {"rank": 16, "alpha": 32, "rate": 3e-3},
             "llora16": {"rank": 16, "alpha": 32, "rate": 6e-3}, "whole16": {"rank": 16, "alpha": 32, "rate": 6e-3}}


def linearize(model):
    """f(x) = W0 x + s (B0 A0 + B0 (A - A0) + (B - B0) A0) x in every LoRA layer, for A0 and B0 as they are now."""
    import types

    import peft
    for layer in model.modules():
        if not isinstance(layer, peft.tuners.lora.layer.Linear):
            continue
        layer.start_a = layer.lora_A["default"].weight.detach().clone()
        layer.start_b = layer.lora_B["default"].weight.detach().clone()

        def forward(self, x, *args, **kwargs):
            a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
            first = x @ self.start_a.T
            change = first @ b.T + (x @ (a - self.start_a).T) @ self.start_b.T
            return self.base_layer(x) + self.scaling["default"] * change
        layer.forward = types.MethodType(forward, layer)


def drawn(lengths, batch, steps, draws):
    """Batches of texts of like length: eight at a time are drawn together and sorted."""
    import torch
    order, batches = [], []
    while len(batches) < steps:
        while len(order) < 8 * batch:
            order += torch.randperm(len(lengths), generator=draws).tolist()
        some, order = sorted(order[:8 * batch], key=lambda i: lengths[i]), order[8 * batch:]
        batches += [some[batch * k:batch * (k + 1)] for k in torch.randperm(8, generator=draws).tolist()]
    return batches[:steps]


def train(folder, paradigm, name, data, settings, seed):
    import peft
    import safetensors.torch
    import torch
    how = PARADIGMS[paradigm]
    torch.manual_seed(1000 * seed)  # adapters of one seed and rank share their initialisation
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if paradigm == "linearized":
        model = linearized.Linearized(settings)
        trained = [one.requires_grad_() for one in model.change.values()]
    else:
        model = common.upper_layers(common.load_encoder(settings["encoder"]), settings["layers"])
    if "rank" in how:
        config = peft.LoraConfig(r=how["rank"], lora_alpha=how["alpha"], target_modules=["query", "value"])
        model = peft.get_peft_model(model, config)
        model.save_pretrained(new / "init")
        if paradigm == "llora16":
            linearize(model)
        elif paradigm == "whole16":
            model = linearized.LinearizedAdapter(settings, new / "init")
            trained = list(model.b.values())
    labels = data.splits[name, "train"][1]
    if paradigm not in ("linearized", "whole16"):
        trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=how["rate"], weight_decay=0.0)
    lengths = [len(one) for one in data.splits[name, "train"][0]]
    losses, steps = [], settings["steps"]
    for step, places in enumerate(drawn(lengths, settings["batch"], steps, torch.Generator().manual_seed(seed))):
        for group in optimizer.param_groups:
            group["lr"] = how["rate"] * min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)
        logits = common.SCALE * data.embed(model, name, "train", places) @ data.heads[name].T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([labels[i] for i in places]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    if paradigm == "whole16":
        model.save(new / "init", new / "adapter")
    elif "rank" in how:
        model.save_pretrained(new / "adapter")
    else:
        safetensors.torch.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, new / "model.safetensors")
    common.write_json(new / "losses.json", losses)
    os.rename(new, folder)
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--settings", type=pathlib.Path, required=True)
    parser.add_argument("--share", type=common.share, default=(0, 1), help="K/N: every Nth model from the Kth on")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    settings = common.read_json(given.settings)
    tasks = common.read_json(given.work / "tasks.json")
    if tasks is None:
        tasks = task_lists.make()
        common.write_json(given.work / "tasks.json", tasks)
    data = common.Tasks(given.work, tasks, settings)
    base = given.work / "base" / "model.safetensors"
    if not base.exists():
        import safetensors.torch
        upper = common.upper_layers(common.load_encoder(settings["encoder"]), settings["layers"])
        with common.written(base) as new:
            safetensors.torch.save_file(upper.state_dict(), new)
    first, step = given.share
    jobs = [(seed, paradigm, name) for seed in settings["seeds"] for paradigm in settings["paradigms"] for name in data.names]
    for seed, paradigm, name in jobs[first::step]:
        folder = given.work / f"seed{seed}" / paradigm / name
        if folder.exists():
            continue
        start = time.time()
        losses = train(folder, paradigm, name, data, settings, seed)
        common.took(given.work, f"training/seed{seed}/{paradigm}/{name}", time.time() - start)
        tail = losses[-5:]
        print(f"seed {seed} {paradigm} {name}: loss {losses[0]:.3f} -> {sum(tail) / len(tail):.3f} in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
