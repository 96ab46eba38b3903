# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm.model_executor.model_loader.link_checkpoint import link_checkpoint


def save(checkpoint: Path, *names: str, step: int | None = None) -> Path:
    checkpoint.mkdir(parents=True)
    for name in (*names, "optimizer.pt", "training_args.bin"):
        (checkpoint / name).write_text(f"{name} of {checkpoint.name}")
    if step is not None:
        state = json.dumps({"global_step": step})
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def links_in(directory: Path) -> dict[str, str]:
    return {p.name: os.readlink(p) for p in directory.iterdir() if p.is_symlink()}


@pytest.mark.parametrize("folder", ["checkpoints", "."])
def test_the_newest_is_the_one_with_most_steps(tmp_path, folder):
    for step in (9, 10, 2):
        save(tmp_path / folder / f"checkpoint-{step}", "model.safetensors")
    (tmp_path / folder / "checkpoint-11").mkdir()  # still empty
    (link,) = link_checkpoint(tmp_path)
    assert link == tmp_path / "model.safetensors"
    assert link.read_text() == "model.safetensors of checkpoint-10"
    assert not os.path.isabs(os.readlink(link))


def test_the_trainers_step_counts_before_the_name(tmp_path):
    save(tmp_path / "checkpoints/epoch-1", "model.pt", step=700)
    save(tmp_path / "checkpoints/checkpoint-90", "model.pt", step=90)
    link_checkpoint(tmp_path)
    assert links_in(tmp_path) == {"model.pt": "checkpoints/epoch-1/model.pt"}


def test_shards_replace_earlier_links(tmp_path):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    old = save(tmp_path / "checkpoints/checkpoint-1", *shards, index)
    link_checkpoint(tmp_path)
    assert links_in(tmp_path).keys() == {*shards, index}
    save(tmp_path / "checkpoints/checkpoint-2", "model.safetensors", "model.bin")
    link_checkpoint(tmp_path)
    assert links_in(tmp_path).keys() == {"model.safetensors"}
    assert (old / shards[0]).exists()  # only links go
    for name in ("checkpoint-1", "checkpoints/checkpoint-1", old):
        link_checkpoint(tmp_path, name)
        assert links_in(tmp_path).keys() == {*shards, index}


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("real", ["model.safetensors", INDEX])
def test_weights_of_its_own_are_replaced_with_force_only(tmp_path, real):
    save(tmp_path / "checkpoints/checkpoint-1", "model.safetensors")
    (tmp_path / real).write_text("the only copy")
    with pytest.raises(FileExistsError, match=f"which are not links: {real}. Move the"):
        link_checkpoint(tmp_path)
    assert (tmp_path / real).read_text() == "the only copy"
    assert not links_in(tmp_path)
    link_checkpoint(tmp_path, force=True)
    assert links_in(tmp_path).keys() == {"model.safetensors"}
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize(
    ("saved", "real"),
    [("model.safetensors", "other.safetensors"), ("model.bin", "other.safetensors")],
)
def test_weights_of_other_names_are_never_deleted(tmp_path, saved, real):
    save(tmp_path / "checkpoints/checkpoint-1", saved)
    for name in (real, saved):
        (tmp_path / name).write_text("the only copy")
    with pytest.raises(FileExistsError, match=f"checkpoint-1, or instead: {real}. Mov"):
        link_checkpoint(tmp_path, force=True)
    for name in (real, saved):
        assert (tmp_path / name).read_text() == "the only copy"


def test_weights_that_vllm_does_not_read_are_left_alone(tmp_path):
    save(tmp_path / "checkpoints/checkpoint-1", "model.pt")
    link_checkpoint(tmp_path)
    save(tmp_path / "checkpoints/checkpoint-2", "model.safetensors")
    (tmp_path / "other.bin").write_text("the only copy")
    for force in (False, True):
        link_checkpoint(tmp_path, force=force)
        assert (tmp_path / "other.bin").read_text() == "the only copy"
        assert links_in(tmp_path).keys() == {"model.safetensors"}


def test_nothing_to_link(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoints: expected"):
        link_checkpoint(tmp_path)
    save(tmp_path / "checkpoints/checkpoint-1")
    with pytest.raises(FileNotFoundError, match="checkpoint-1 has no weights: expect"):
        link_checkpoint(tmp_path, "checkpoint-1")
    with pytest.raises(FileNotFoundError, match="it has checkpoints/checkpoint-1."):
        link_checkpoint(tmp_path, "checkpoint-7")


def test_the_command_says_which_file_is_in_the_way(tmp_path):
    save(tmp_path / "checkpoint-1", "model.safetensors")
    (tmp_path / "model.safetensors").write_text("the only copy")
    command = [sys.executable, "-m", link_checkpoint.__module__, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "not links: model.safetensors. Move them away" in refused.stderr
