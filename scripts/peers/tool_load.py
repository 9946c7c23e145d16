"""Directories that the taskvec tool writes, loaded by transformers and diffusers: the weights are the mean of the models', embeddings come out."""
# SPDX-License-Identifier: Apache-2.0
import copy
import logging
import pathlib
import subprocess
import tempfile

import torch
import transformers

from common import tool_arguments

TOLERANCE = 2e-7  # of the largest weight, in f32: torch's mean of two and ours differ by a rounding


def models():
    """Name -> (a new model, its class's from_pretrained, inputs, what comes out)."""
    from diffusers import AutoencoderKL, UNet2DModel
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

    ids = torch.arange(6)[None]
    small = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return {
        "BERT": (BertModel(BertConfig(**small)), AutoModel, {"input_ids": ids}, lambda out: out.last_hidden_state),
        "CLIP's text model": (CLIPTextModel(CLIPTextConfig(**small)), CLIPTextModel, {"input_ids": ids}, lambda out: out.last_hidden_state),
        "T5's encoder": (T5EncoderModel(T5Config(vocab_size=61, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)), T5EncoderModel, {"input_ids": ids}, lambda out: out.last_hidden_state),
        "Llama": (LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=False)), AutoModelForCausalLM, {"input_ids": ids}, lambda out: out.logits),
        "Llama, tied": (LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=True)), AutoModelForCausalLM, {"input_ids": ids}, lambda out: out.logits),
        "a UNet": (
            UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")),
            UNet2DModel, {"sample": torch.ones(1, 1, 8, 8), "timestep": 3}, lambda out: out.sample),
        "a VAE": (
            AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), norm_num_groups=4, sample_size=8),
            AutoencoderKL, {"sample": torch.ones(1, 1, 8, 8)}, lambda out: out.sample),
    }


def main():
    arguments = tool_arguments(__doc__)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    failures = []
    torch.manual_seed(3)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name, (base, loader, inputs, of) in models().items():
            place = scratch / name.replace(" ", "-").replace(",", "").replace("'", "")
            base.eval()
            tuned = copy.deepcopy(base)
            with torch.no_grad():
                for parameter in tuned.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            base.save_pretrained(place / "base")
            tuned.save_pretrained(place / "tuned")
            expected = copy.deepcopy(base)
            with torch.no_grad():
                for mine, one, other in zip(expected.parameters(), base.parameters(), tuned.parameters()):
                    mine.copy_(0.5 * one + 0.5 * other)
            for out, more in (("one", []), ("shards", ["--shard-size", "2kB"])):
                done = subprocess.run(
                    [arguments.tool, "merge", "--method", "average", "--task", place / "base", "--task", place / "tuned", "--out", place / out, *more],
                    capture_output=True, text=True)
                if done.returncode:
                    failures.append(f"{name}: {done.stderr.strip()}")
                    continue
                loaded = loader.from_pretrained(place / out).eval()
                apart = max(
                    ((mine - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()
                    for mine, other in zip(loaded.state_dict().values(), expected.state_dict().values()) if mine.is_floating_point() and mine.numel())
                with torch.no_grad():
                    there, here = of(loaded(**inputs)), of(expected(**inputs))
                output = ((there - here).abs().max() / here.abs().max()).item()
                print(f"  {name + ', ' + out:28s} weights apart by {apart:.1e}, outputs by {output:.1e}")
                if not apart <= TOLERANCE or not output <= 1e-5 or not here.abs().max() > 0:
                    failures.append(f"{name}, {out}: weights off by {apart:.2e}, outputs by {output:.2e}")
    for failure in failures:
        print("FAILED", failure)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
