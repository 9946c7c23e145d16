"""Tiny models of Stable Diffusion under the names of single files, by diffusers' own converters."""
# SPDX-License-Identifier: Apache-2.0
import torch

PREFIX = "model.diffusion_model."
# What single files call the parts of a residual block; where blocks lie, convert_ldm_unet_checkpoint says.
RESIDUAL = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
ENDS = ["input_blocks.0.0", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.0", "out.2"]


def unet(kind):
    """A UNet with the blocks of Stable Diffusion 1 or XL, and few channels."""
    from diffusers import UNet2DConditionModel

    common = dict(sample_size=8, layers_per_block=2, norm_num_groups=4, in_channels=4, out_channels=4)
    if kind == "sd1":
        return UNet2DConditionModel(
            **common, block_out_channels=(8, 8, 16, 16), cross_attention_dim=12, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    return UNet2DConditionModel(
        **common, block_out_channels=(8, 16, 16), cross_attention_dim=20, attention_head_dim=2, use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 3), addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=34,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))


def convert(checkpoint, model):
    """The tensors of a single file's UNet under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(dict(checkpoint), dict(model.config))


def ldm_names(model):
    """Tensors' names in diffusers -> those in single files, without their prefix: the converter, inverted on names."""
    state = model.state_dict()
    words = ["weight", "bias"]
    within = sorted({name.split(".", 4)[4] for name in state if ".attentions." in name and not name.startswith("mid_block")})
    within = sorted(set(within) | {name.split(".", 3)[3] for name in state if name.startswith("mid_block.attentions.")})
    levels, period = len(model.config.block_out_channels), model.config.layers_per_block + 1
    candidates = [f"{end}.{word}" for end in ENDS for word in words]
    for block in [f"input_blocks.{i}" for i in range(1, levels * period)] + [f"output_blocks.{i}" for i in range(levels * period)]:
        candidates += [f"{block}.0.{part}.{word}" for part in RESIDUAL for word in words]
        candidates += [f"{block}.1.{rest}" for rest in within]
        candidates += [f"{block}.{place}.{word}" for place in ("0.op", "1.conv", "2.conv") for word in words]
    candidates += [f"middle_block.{i}.{part}.{word}" for i in (0, 2) for part in RESIDUAL for word in words] + [f"middle_block.1.{rest}" for rest in within]

    def converted(names):
        return {to: name for to, name in convert({PREFIX + name: name for name in names}, model).items() if to in state}

    # An upsampler stands behind a level's attention, where that has any: of the two places the converter takes both.
    attended = {name.split(".")[1] for name in state if name.startswith("up_blocks.") and ".attentions." in name}
    wrong = [f"output_blocks.{(level + 1) * period - 1}.{1 if str(level) in attended else 2}.conv.{word}" for level in range(levels) for word in words]
    found = converted([name for name in candidates if name not in wrong])
    if set(found) != set(state) or set(converted(found.values())) != set(state):
        raise SystemExit(f"names of single files are missing for {sorted(set(state) - set(found))[:3]}")
    return found


def single_file(model):
    """The tensors of a UNet as a single file has them."""
    names = ldm_names(model)
    return {PREFIX + names[name]: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def with_text_model(state):
    """A text encoder's tensors under the names that all versions of transformers read: newer ones leave "text_model." out."""
    known = ("text_model.", "text_projection.")
    return {name if name.startswith(known) else "text_model." + name: tensor for name, tensor in state.items()}


def open_clip(state, prefix):
    """transformers' CLIP as OpenCLIP has it: q, k and v are one tensor, the projection is multiplied from the right."""
    made = {}
    for name, tensor in with_text_model(state).items():
        name = name.removeprefix("text_model.")
        if name.endswith("position_ids") or ".self_attn.k_proj" in name or ".self_attn.v_proj" in name:
            continue
        if ".self_attn.q_proj." in name:
            whole = with_text_model(state)
            parts = [whole["text_model." + name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensor = torch.cat(parts)
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        for old, new in (
            ("encoder.layers.", "transformer.resblocks."), ("layer_norm", "ln_"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.", "attn."),
            ("final_ln_", "ln_final"), ("final_layer_norm", "ln_final"), ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding")):
            name = name.replace(old, new)
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        made[prefix + name] = tensor.detach().clone().contiguous()
    return made
