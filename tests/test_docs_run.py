# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The programs of the README and of docs/models run as a reader runs them."""

import json
import re
from pathlib import Path

import pytest
from doc_blocks import DOCS, ROOT, last_line, run, titled_blocks, write_blocks

# Serves MyModel by a factory, with options, and prints a continuation.
SERVE = """
import json, sys

from vllm import LLM, ModelRegistry, SamplingParams

if __name__ == "__main__":
    module, capabilities, options = sys.argv[1], *map(json.loads, sys.argv[2:])
    factory = __import__(module).build
    ModelRegistry.register_model("MyModel", factory, **capabilities)
    llm = LLM(model=".", dtype="float32", skip_tokenizer_init=True, **options)
    params = SamplingParams(temperature=0, max_tokens=12, detokenize=False)
    prompt = {"prompt_token_ids": list(range(40))}
    print(list(llm.generate(prompt, params)[0].outputs[0].token_ids))
"""
# Prints the same of the module itself, recomputed in full for every token.
GREEDY = """
import json
from types import SimpleNamespace

import torch
from my_model import MyModel
from safetensors.torch import load_file

model = MyModel(SimpleNamespace(**json.load(open("config.json"))))
model.load_state_dict(load_file("model.safetensors"))
ids = list(range(40))
for _ in range(12):
    hidden = model(torch.tensor(ids), torch.arange(len(ids)))
    ids.append(int(model.lm_head(hidden[-1]).argmax()))
print(ids[40:])
"""


@pytest.fixture(scope="module")
def guide(tmp_path_factory) -> Path:
    """A folder with the guide's programs, and the checkpoint that train.py saved."""
    folder = tmp_path_factory.mktemp("guide")
    for page in sorted((DOCS / "models").glob("*.md")):
        write_blocks(page, folder)
    (folder / "continue.py").write_text(SERVE)
    (folder / "greedy.py").write_text(GREEDY)
    run(folder, "train.py")
    return folder


@pytest.fixture(scope="module")
def continuation(guide) -> str:
    """What the guide's model says, computed without vLLM."""
    return last_line(run(guide, "greedy.py"))


def test_guide_trains(guide):
    assert (guide / "model.safetensors").exists()


def test_guide_trains_in_parallel(guide):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(guide, *torchrun, "train_parallel.py")
    assert (guide / "checkpoint/.metadata").exists()


def test_the_ten_lines_of_the_readme_are_ten():
    assert "in ten lines" in (ROOT / "README.md").read_text()
    lines = titled_blocks(ROOT / "README.md")["serve.py"].split("\n")
    assert len([line for line in lines if line]) == 10, "Edit serve.py in README.md."


@pytest.mark.engine
def test_readme_example(tmp_path):
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    write_blocks(ROOT / "README.md", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes = {f"attention.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    shapes |= {"embedding.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights["lm_head.bias"] = torch.zeros(vocab)
    save_file(weights, tmp_path / "model.safetensors")
    words = {f"w{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)

    serve = (tmp_path / "serve.py").read_text()
    (tmp_path / "serve.py").write_text(serve.replace("path/to/model", "."))
    assert re.fullmatch(r"(w\d+\s*)+", last_line(run(tmp_path, "serve.py")).strip())


@pytest.mark.engine
def test_first_program_of_the_readme(tmp_path):
    write_blocks(ROOT / "README.md", tmp_path)
    run(tmp_path, "first.py", processes=False)  # its exit code is the report's


@pytest.mark.gpu
def test_first_program_of_the_readme_on_a_gpu(tmp_path):
    write_blocks(ROOT / "README.md", tmp_path)
    run(tmp_path, "first.py")


@pytest.mark.engine
def test_guide_serves_what_it_trained(guide):
    run(guide, "serve.py", processes=False)  # its exit code is the report's


@pytest.mark.engine
@pytest.mark.parametrize(
    "module, capabilities, size",
    [
        ("dtensor", {}, "tensor_parallel_size"),
        ("pipeline", {"supports_pp": True}, "pipeline_parallel_size"),
    ],
)
def test_guide_in_parallel(guide, continuation, module, capabilities, size):
    options = {size: 2, "enforce_eager": True}
    arguments = (module, json.dumps(capabilities), json.dumps(options))
    served = last_line(run(guide, "continue.py", *arguments))
    assert served == continuation


@pytest.mark.engine
@pytest.mark.parametrize(
    "module, capabilities",
    [
        ("vllm_parallel", {}),
        ("smallest", {"is_attention_free": True}),
        ("plan_model", {}),
    ],
)
def test_other_modules_of_the_docs_serve(guide, module, capabilities):
    arguments = (module, json.dumps(capabilities), '{"load_format": "dummy"}')
    served = run(guide, "continue.py", *arguments, processes=False)
    assert len(json.loads(last_line(served))) == 12
