# SPDX-License-Identifier: Apache-2.0
"""The encoder with its frozen heads, and files that a later run finds."""
import json
import os
import pathlib
import re
import sys
import tempfile


def fail(text):
    sys.exit(f"scripts/reproduce: error: {text}")


def write_json(path, value):
    """All of it, or nothing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(name, path)


def read_json(path, default=None):
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        return default


def replace_blocks(page, blocks):
    """{name: lines}: what stands between '<!-- measured: NAME -->' and '<!-- end -->' of a page."""
    text = page.read_text()
    for name, lines in blocks.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            fail(f"{page} has no markers '<!-- measured: {name} -->' and '<!-- end -->'")
        text = pattern.sub(lambda found: found[1] + "\n".join(lines).rstrip() + "\n" + found[2], text)
    page.write_text(text)


def load_encoder(folder, attention="sdpa"):
    import torch
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return transformers.AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()


def load_tokenizer(folder):
    import tokenizers
    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(24)
    return tokenizer


def mask_of(lengths, longest):
    import torch
    return torch.arange(longest)[None] < torch.tensor(lengths)[:, None]


def run_layers(layers, hidden, mask):
    bias = (~mask)[:, None, None].to(hidden.dtype) * -1e9
    for layer in layers:
        hidden = layer(hidden, attention_mask=bias)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def pooled(hidden, mask):
    """Normalized means over tokens, as the sentence encoder ends."""
    import torch
    mask = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def upper_layers(encoder, count):
    """The part that is trained, merged and stored: the last layers, as a module of its own. What is below stays as it is."""
    import torch

    class Upper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.ModuleList(list(encoder.encoder.layer)[-count:])

        def forward(self, hidden, mask):
            return pooled(run_layers(self.layer, hidden, mask), mask)

    return Upper()


SCALE = 20.0  # of cosines, as sentence-transformers trains with


class Tasks:
    """Texts as what the frozen lower part makes of them, labels, and the heads: what the pre-trained encoder makes of the labels' words."""

    def __init__(self, work, tasks, settings):
        import torch
        self.names = list(tasks)
        cache = pathlib.Path(work) / "lower.pt"
        if not cache.exists():
            encoder, tokenizer = load_encoder(settings["encoder"]), load_tokenizer(settings["encoder"])
            lower = list(encoder.encoder.layer)[:len(encoder.encoder.layer) - settings["layers"]]
            upper = upper_layers(encoder, settings["layers"])

            def below(texts):
                ids = [one.ids for one in tokenizer.encode_batch(texts)]
                result = [None] * len(ids)
                for places in batches_of(ids, 64):
                    longest = max(len(ids[i]) for i in places)
                    mask = mask_of([len(ids[i]) for i in places], longest)
                    hidden = run_layers(lower, encoder.embeddings(torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in places])), mask)
                    for k, i in enumerate(places):
                        result[i] = hidden[k, :len(ids[i])].clone()
                return result

            with torch.no_grad():
                found = {"heads": {}, "splits": {}}
                for name, task in tasks.items():
                    hidden = below(task["labels"])
                    found["heads"][name] = torch.cat([upper(one[None], mask_of([len(one)], len(one))) for one in hidden])
                    for split in ("train", "validation", "test"):
                        pairs = task[split][:settings["limits"][split]]
                        found["splits"][name, split] = (below([text for text, _ in pairs]), [label for _, label in pairs])
            torch.save(found, str(cache) + ".new")
            os.replace(str(cache) + ".new", cache)
        found = torch.load(cache, weights_only=True)
        self.heads, self.splits = found["heads"], found["splits"]

    def through(self, work, name, split, places):
        """What `work` makes of texts."""
        import torch
        hidden = [self.splits[name, split][0][i] for i in places]
        mask = mask_of([len(one) for one in hidden], max(len(one) for one in hidden))
        return work(torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True), mask)

    def embed(self, model, name, split, places):
        return self.through(model, name, split, places)

    def batches(self, name, split, size, limit=None):
        """Places, those of like length together."""
        return batches_of(self.splits[name, split][0][:limit], size)

    def logits(self, model, name, split, limit=None):
        """Of the first `limit` texts, a row each."""
        import torch
        count = len(self.splits[name, split][0][:limit])
        found = torch.empty(count, len(self.heads[name]))
        with torch.no_grad():
            for places in self.batches(name, split, 64, limit):
                found[places] = SCALE * self.embed(model, name, split, places) @ self.heads[name].T
        return found

    def accuracy(self, model, name, split, limit=None):
        import torch
        found = self.logits(model, name, split, limit).argmax(1)
        return float((found == torch.tensor(self.splits[name, split][1][:limit])).double().mean())

    def loss(self, model, name, split, limit=None):
        """Mean cross-entropy."""
        import torch
        return float(torch.nn.functional.cross_entropy(self.logits(model, name, split, limit), torch.tensor(self.splits[name, split][1][:limit])))


def batches_of(sequences, size):
    places = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
    return [places[i:i + size] for i in range(0, len(places), size)]
