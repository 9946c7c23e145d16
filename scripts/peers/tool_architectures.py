"""The taskvec tool beside transformers and PEFT, architecture by architecture: adapters that extract-lora makes, loaded by PEFT, and
adapters of PEFT, folded by fuse, give the outputs of the models that they stand for, tied heads and embeddings included."""
# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess
import tempfile
import warnings

import torch

from common import tool_arguments

TOLERANCE = 1e-5  # of the outputs, which are of the size of 1


def architectures():
    """A tiny model of each, its inputs, the module of its head (where that may be adapted alone), and one of an embedding or layer."""
    import transformers as t

    words = 61
    encoder = dict(vocab_size=words, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=40)
    pair = dict(vocab_size=words, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
    special = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    sight = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4)
    t5 = dict(vocab_size=words, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    modern = dict(vocab_size=words, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)

    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 60, (2, 7), generator=generator)
    text, both = dict(input_ids=ids), dict(input_ids=ids, decoder_input_ids=ids.flip(1))
    picture = torch.randn(2, 3, 16, 16, generator=generator)
    sound = dict(input_features=torch.randn(2, 8, 40, generator=generator), decoder_input_ids=ids)
    return {
        "T5": (t.T5ForConditionalGeneration, t.T5Config(**t5), both, "lm_head", None),
        "T5 encoder": (t.T5EncoderModel, t.T5Config(**t5), text, None, None),
        "BART": (t.BartForConditionalGeneration, t.BartConfig(**pair, **special, max_position_embeddings=40, decoder_start_token_id=2), both, "lm_head", None),
        "RoBERTa": (t.RobertaForMaskedLM, t.RobertaConfig(**encoder, pad_token_id=1), text, "lm_head.decoder", "roberta.embeddings.word_embeddings"),
        "BERT": (t.BertForMaskedLM, t.BertConfig(**encoder), text, "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
        "BERT classifier": (t.BertForSequenceClassification, t.BertConfig(**encoder), text, None, "bert.embeddings.word_embeddings"),
        "ALBERT": (t.AlbertForMaskedLM, t.AlbertConfig(**encoder, embedding_size=16), text, "predictions.decoder", "albert.embeddings.word_embeddings"),
        "ELECTRA": (t.ElectraForMaskedLM, t.ElectraConfig(**encoder, embedding_size=16), text, "generator_lm_head", "electra.embeddings.word_embeddings"),
        "DistilBERT": (t.DistilBertForMaskedLM, t.DistilBertConfig(vocab_size=words, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=40), text, "vocab_projector", "distilbert.embeddings.word_embeddings"),
        "DeBERTa": (t.DebertaV2ForMaskedLM, t.DebertaV2Config(**encoder, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, norm_rel_ebd="layer_norm", position_biased_input=False), text, "cls.predictions.decoder", "deberta.embeddings.word_embeddings"),
        "ModernBERT": (t.ModernBertForMaskedLM, t.ModernBertConfig(**modern), text, "decoder", "model.embeddings.tok_embeddings"),
        "CLIP": (t.CLIPModel, t.CLIPConfig(text_config=encoder, vision_config=sight, projection_dim=8), dict(text, pixel_values=picture), None, "text_model.embeddings.position_embedding"),
        "ViT": (t.ViTForImageClassification, t.ViTConfig(**sight, num_labels=5), dict(pixel_values=picture), None, "vit.layers.0.attention.q_proj"),
        "ResNet": (t.ResNetForImageClassification, t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3), dict(pixel_values=torch.randn(2, 3, 32, 32, generator=generator)), None, "resnet.embedder.embedder.convolution"),
        "Whisper": (t.WhisperForConditionalGeneration, t.WhisperConfig(**pair, pad_token_id=1, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, num_mel_bins=8, max_source_positions=20, max_target_positions=20), sound, "proj_out", "model.decoder.embed_tokens"),
        "GPT-2": (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=words, n_embd=16, n_layer=2, n_head=2, n_positions=40), text, "lm_head", "transformer.wte"),
        "GPT-NeoX": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**encoder), text, "lm_head", "gpt_neox.embed_in"),
        "GPT-NeoX tied": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**encoder, tie_word_embeddings=True), text, "lm_head", "gpt_neox.embed_in"),
        "OPT": (t.OPTForCausalLM, t.OPTConfig(vocab_size=words, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=40), text, "lm_head", "model.decoder.embed_tokens"),
        "Llama": (t.LlamaForCausalLM, t.LlamaConfig(**encoder, num_key_value_heads=1), text, "lm_head", "model.embed_tokens"),
        "Llama tied": (t.LlamaForCausalLM, t.LlamaConfig(**encoder, num_key_value_heads=1, tie_word_embeddings=True), text, "lm_head", "model.embed_tokens"),
    }


def outputs(model, inputs):
    model.eval()
    with torch.no_grad():
        found = model(**inputs)
    if hasattr(found, "logits"):
        return found.logits
    return torch.cat([found.text_embeds.flatten(), found.image_embeds.flatten()]) if hasattr(found, "text_embeds") else found.last_hidden_state


def main():
    arguments = tool_arguments(__doc__)
    failures = []

    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    def tool(*words):
        done = subprocess.run([arguments.tool, *map(str, words)], capture_output=True, text=True)
        if done.returncode != 0:
            failures.append(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
        return done.returncode == 0

    def judge(what, apart):
        print(f"  {what:52s} apart by {apart:.1e}")
        if not apart <= TOLERANCE:
            failures.append(f"{what}: off by {apart:.2e}, allowed {TOLERANCE:.0e}")

    def noise(model, size):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * size)

    for name, (kind, config, inputs, head, module) in architectures().items():
        with tempfile.TemporaryDirectory() as scratch:
            at = pathlib.Path(scratch)
            torch.manual_seed(1)
            model = kind(config)
            noise(model, 0.15)
            model.save_pretrained(at / "base")
            noise(model, 0.05)
            model.save_pretrained(at / "tuned")
            expected = outputs(model, inputs)

            made = tool("extract-lora", "--base", at / "base", "--task", at / "tuned", "--energy", 1, "--sparse-rest", "--out", at / "adapter")
            rest, under = at / "adapter" / "rest.delta.safetensors", at / "base"
            if made and rest.exists():
                under = at / "rested"
                made = tool("apply", "--base", at / "base", "--delta", rest, "--out", under)
            if made:
                adapted = PeftModel.from_pretrained(kind.from_pretrained(under), at / "adapter")
                judge(f"{name}: extracted, by PEFT", (outputs(adapted, inputs) - expected).abs().max().item())
                if tool("fuse", "--base", under, "--adapter", at / "adapter", "--out", at / "fused"):
                    judge(f"{name}: extracted, by fuse", (outputs(kind.from_pretrained(at / "fused"), inputs) - expected).abs().max().item())

            for what, targets, dora in [("head", [head], False), ("module", [module], False), ("both", [head, module], False), ("module under DoRA", [module], True)]:
                if None in targets:
                    continue
                torch.manual_seed(3)
                adapted = get_peft_model(kind.from_pretrained(at / "base"), LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora))
                with torch.no_grad():
                    for key, parameter in adapted.named_parameters():
                        if "lora_" in key:
                            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1 if "magnitude" in key else 0))
                expected_here = outputs(adapted, inputs)
                adapted.save_pretrained(at / what, save_embedding_layers=dora and head is not None)
                if tool("fuse", "--base", at / "base", "--adapter", at / what, "--out", at / f"with {what}"):
                    judge(f"{name}: {what}, by fuse", (outputs(kind.from_pretrained(at / f"with {what}"), inputs) - expected_here).abs().max().item())
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
