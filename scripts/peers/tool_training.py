"""The code of docs/training.md, taken from the page and run: adapters trained linearized, merged, folded and checked."""
# SPDX-License-Identifier: Apache-2.0
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import transformers

from common import tool_arguments

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "training.md"


def main():
    tool = str(pathlib.Path(tool_arguments(__doc__).tool).resolve())
    text = PAGE.read_text()
    files = dict(re.findall(r"<!-- training: (\S+) -->\n```python\n(.*?)```", text, re.S))
    commands = [line.strip() for line in text.split("\n") if re.match(r"    (python|taskvec) ", line)]
    assert sorted(files) == ["check.py", "llora.py", "train.py"] and len(commands) == 4, (sorted(files), commands)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name, code in files.items():
            (scratch / name).write_text(code)
        torch.manual_seed(5)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=32)).save_pretrained(scratch / "base")

        def run(line, expect=0):
            words = [{"python": sys.executable, "taskvec": tool}.get(word, word) if place == 0 else word for place, word in enumerate(line.split())]
            done = subprocess.run(words, cwd=scratch, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"})
            print(f"  {line}: {(done.stdout.strip() or done.stderr.strip()).splitlines()[-1]}")
            if (done.returncode == 0) != (expect == 0):
                raise SystemExit(f"'{line}' of docs/training.md ended with {done.returncode}:\n{done.stderr}")

        for line in commands:
            run(line)
        run("python check.py base start both both-plain")
        run("python check.py base start both start", expect=1)  # it can fail

        # The same from an initialisation whose B0 is not 0: the rank doubles, and the adapter itself is not the plain one.
        train = files["train.py"].replace("r=4,", "r=4, init_lora_weights=False,")
        assert train != files["train.py"]
        (scratch / "train.py").write_text(train)
        for line in commands:
            run(re.sub(r"\b(start|both-plain|both|math|code)\b", r"other-\1", line))
        run("python check.py base other-start other-both other-both-plain")
        run("python check.py base other-start other-both other-both", expect=1)


if __name__ == "__main__":
    main()
