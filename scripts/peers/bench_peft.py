"""What a user of PEFT runs to merge adapters: the base, its adapters, add_weighted_adapter, save_pretrained. Without --type the base is loaded, no more."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import pathlib
import shutil

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--base", required=True)
parser.add_argument("--adapter", action="append", default=[], metavar="DIR=WEIGHT")
parser.add_argument("--type")
parser.add_argument("--density", type=float)
parser.add_argument("--out", type=pathlib.Path)
given = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(given.base, dtype=torch.bfloat16)
if given.type:
    paths, weights = zip(*(part.rsplit("=", 1) for part in given.adapter))
    model = PeftModel.from_pretrained(model, paths[0], adapter_name="adapter0", autocast_adapter_dtype=False)
    for index, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=f"adapter{index}", autocast_adapter_dtype=False)
    names = [f"adapter{index}" for index in range(len(paths))]
    model.add_weighted_adapter(names, [float(weight) for weight in weights], "merged", combination_type=given.type, density=given.density)
    model.save_pretrained(given.out / "peft", selected_adapters=["merged"])
    (given.out / "peft/merged").rename(given.out / "merged")
    shutil.rmtree(given.out / "peft")
