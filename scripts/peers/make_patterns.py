"""Writes tests/data/patterns: what Python's re says of expressions over names."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import os
import pathlib
import random
import re
import shutil
import warnings

NAMES = ["", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp", "model.layers.1.mlp.experts.3.up_proj", "lm_head", "Q_PROJ", "q_proj\n"]
WRITTEN = [r".*(?<!q_)proj", r".*q_proj\Z", r"(?P<p>.*)\.mlp", r"(?i:.*MLP)", r"(?i)q_proj", r".*layers\.[]1]+\..*", r".*layers\.[[:digit:]]\.mlp", r".*layers\.\d{,2}\.mlp",
           r".*layers\.\d{2,}\..*", r"model(?#of it)\..*", r"(.*\.)?(q_proj)$", r"(.*\.)?(^lm_head)$", r".*\bmlp\b.*", r"\Amodel.*", r"[^\W_]+", r"[\w.-]+proj", r".*\.(?!0)\d+\.mlp",
           r".*(?=proj).*", r"(?-i:q)_proj", r"(?s:.*)", r"q_proj$", r"q_proj\Z", r"(?m:q_proj$.)", r"\x6dodel.*", r"\u006dodel.*", r"\155odel.*", r"q_proj\n", r"x{", r"{}", r"a{,}", r"q{1_proj",
           "(", ")", "[", "[]", "*", "q**", "q{2,1}", r"\q", r"\x6", "(?<=a*)b", "(?z)", "q(?i)", "(?P<", "[b-a]", "\\", "(?", "(?-", "(?-)q", "^*", r"a|*"]
ATOMS = ["a", "b", "q", "A", ".", r"\.", r"\d", r"\w", r"\W", r"\s", r"\D", "1", "0", "_", "[ab]", "[^a]", "[]x]", "[^]x]", "[a-q]", "[[:digit:]]", r"[\d_]", r"[^\W_]", r"\Z", r"\A",
         r"\b", "^", "$", r"\x61", r"\141", r"\07", r"[\b]", "-", "{", "}", "]", "(?#c)", r"\-", "[a-]", r"[\w-]"]
REPEATS = ["*", "+", "?", "{2}", "{,2}", "{1,}", "{1,2}", "{,}", "*?", "??", "{0}", "{x", "{}", "+?"]


def expression(random, depth):
    kind = random.random()
    if depth <= 0 or kind < 0.4:
        return random.choice(ATOMS)
    if kind < 0.6:
        return expression(random, depth - 1) + random.choice(REPEATS)
    if kind < 0.8:
        return expression(random, depth - 1) + expression(random, depth - 1)
    if kind < 0.88:
        flags = random.choice(["", "?:", "?P<n%d>" % random.randrange(10**6), "?i:", "?-i:", "?s:", "?m:"])
        return "(" + flags + expression(random, depth - 1) + "|" + expression(random, depth - 1) + ")"
    if kind < 0.96:
        return "(" + random.choice(["?=", "?!", "?<=", "?<!"]) + expression(random, depth - 2) + ")"
    return "(" + expression(random, depth - 1) + ")"


def said(text, name):
    """Whether it matches the whole and whether a beginning; None: it is no expression."""
    try:
        return [re.fullmatch(text, name) is not None, re.match(text, name) is not None]
    except re.error:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "patterns"
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    warnings.simplefilter("ignore", FutureWarning)
    made = [[text, name, said(text, name)] for text in WRITTEN for name in NAMES]
    source = random.Random(17)
    while len(made) < 1200:
        text = expression(source, 5)
        name = "".join(source.choice("aabqA1_.-x") for _ in range(1 + source.randrange(6)))
        if not re.search(r"[*+?}]\+", text):  # what is possessive is not understood
            made.append([text, name, said(text, name)])
    print(f"  {len(made)} matches")
    (out / "python.json").write_text(json.dumps(made, indent=None).replace("], [", "],\n[") + "\n")


if __name__ == "__main__":
    main()
