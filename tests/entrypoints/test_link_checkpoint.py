# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm.entrypoints.link_checkpoint import find_checkpoint, link_checkpoint

OLD_MODULE = "vllm.model_executor.model_loader.link_checkpoint"


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
    old = save(tmp_path / "checkpoints/checkpoint-1", *shards)
    (old / index).write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
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


@pytest.mark.parametrize("module", [link_checkpoint.__module__, OLD_MODULE])
def test_the_command_says_what_it_linked_and_what_it_skipped(tmp_path, module):
    save(tmp_path / "checkpoint-1", "model.safetensors")
    save(tmp_path / "checkpoint-2", "adapter_model.safetensors")
    command = [sys.executable, "-m", module, str(tmp_path)]
    linked = subprocess.run(command, capture_output=True, text=True, timeout=120)
    skipped, link = linked.stdout.splitlines()
    assert skipped.startswith(f"skipped {tmp_path}/checkpoint-2: it has a LoRA adapter")
    assert link.endswith("model.safetensors -> checkpoint-1/model.safetensors")


def test_the_command_says_which_file_is_in_the_way(tmp_path):
    save(tmp_path / "checkpoint-1", "model.safetensors")
    (tmp_path / "model.safetensors").write_text("the only copy")
    command = [sys.executable, "-m", link_checkpoint.__module__, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "not links: model.safetensors. Move them away" in refused.stderr


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


ZERO = (
    "global_step9/mp_rank_00_model_states.pt",
    "global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_to_fp32.py",
    "latest",
)
LAYOUTS = {
    "transformers": (
        ("checkpoint-9/model.safetensors", "checkpoint-9/optimizer.pt")
        + ("checkpoint-9/scheduler.pt", "checkpoint-9/rng_state_0.pth")
        + ("checkpoint-9/training_args.bin", "checkpoint-9/rng_state.pth"),
        "checkpoint-9/model.safetensors",
    ),
    "transformers with deepspeed": (
        ("checkpoint-9/pytorch_model.bin", *(f"checkpoint-9/{name}" for name in ZERO)),
        "checkpoint-9/pytorch_model.bin",
    ),
    "accelerate": (
        ("checkpoint_9/model.safetensors", "checkpoint_9/model_1.safetensors")
        + ("checkpoint_9/optimizer.bin", "checkpoint_9/scheduler.bin")
        + ("checkpoint_9/sampler.bin", "checkpoint_9/random_states_0.pkl"),
        "checkpoint_9/model.safetensors",
    ),
    "verl": (
        ("global_step_9/actor/huggingface/model.safetensors", "global_step_9/data.pt")
        + ("global_step_9/actor/model_world_size_2_rank_0.pt",)
        + ("global_step_9/actor/optim_world_size_2_rank_0.pt",)
        + ("global_step_9/critic/huggingface/model.safetensors",),
        "global_step_9/actor/huggingface/model.safetensors",
    ),
    "skyrl": (
        ("global_step_9/policy/model_state.pt", "global_step_9/trainer_state.pt")
        + ("global_step_9/policy/optimizer_state.pt", "global_step_9/data.pt")
        + ("global_step_9/policy/lr_scheduler_state.pt",),
        "global_step_9/policy/model_state.pt",
    ),
}


@pytest.mark.parametrize("files, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_the_models_weights_are_linked_and_nothing_else(tmp_path, files, expected):
    write(tmp_path / "checkpoints", *files)
    (link,) = link_checkpoint(tmp_path)
    assert os.readlink(link) == f"checkpoints/{expected}"


SKIPPED = {
    "unfinished": (["tmp-checkpoint-20/model.safetensors"], "not finished"),
    "suffix": (["checkpoint-20.tmp/model.safetensors"], "not finished"),
    "hidden": ([".checkpoint-20/model.safetensors"], "not finished"),
    "adapter": (["checkpoint-20/adapter_model.safetensors"], "LoRA adapter"),
    "deepspeed": ([f"checkpoint-20/{name}" for name in ZERO], "zero_to_fp32.py"),
    "deepspeed alone": (["global_step20/mp_rank_00_model_states.pt"], "zero_to_fp32"),
    "fsdp": (["global_step_20/actor/model_world_size_2_rank_0.pt"], "model_merger"),
    "dcp": (["step-20/.metadata", "step-20/__0_0.distcp"], "dcp_to_torch"),
    "lightning": (["epoch=1-step=20.ckpt"], "Lightning"),
    "empty": (["checkpoint-20/config.json"], "has no weights"),
    "shards": (
        ["checkpoint-20/model-00001-of-00002.safetensors"],
        "1 of the 2 shards of model.safetensors",
    ),
}


@pytest.mark.parametrize("files, reason", SKIPPED.values(), ids=SKIPPED)
def test_what_is_not_complete_is_skipped_with_its_reason(tmp_path, files, reason):
    write(tmp_path, *files)
    with pytest.raises(FileNotFoundError, match=f"no complete checkpoint: .*{reason}"):
        link_checkpoint(tmp_path)
    write(tmp_path, "checkpoint-9/model.safetensors")
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.folder == tmp_path / "checkpoint-9"
    (skipped,) = checkpoint.skipped.values()
    assert reason in skipped


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
        '{"weight_map": {"a": "../model-1.safetensors"}}',
        '{"weight_m',
        "[]",
    ],
    ids=["missing", "outside", "cut", "list"],
)
def test_an_index_has_to_be_complete(tmp_path, index):
    write(tmp_path, "checkpoint-9/model.safetensors", "model-1.safetensors")
    write(tmp_path, "checkpoint-20/model-1.safetensors")
    (tmp_path / "checkpoint-20/model.safetensors.index.json").write_text(index)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.folder.name == "checkpoint-9"
    (reason,) = checkpoint.skipped.values()
    assert "model.safetensors.index.json" in reason


@pytest.mark.parametrize("kept", [0, 12, -1])
def test_a_file_that_a_crash_has_cut_is_not_taken(tmp_path, kept):
    for step in (9, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        path = tmp_path / f"checkpoint-{step}/model.safetensors"
        save_file({"weight": torch.ones(4)}, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:kept])
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.folder.name == "checkpoint-9"
    assert "model.safetensors" in checkpoint.skipped[path.parent]


@pytest.mark.parametrize("state", ['{"global_st', "{}", "[]", '{"global_step": "x"}'])
def test_a_broken_trainer_state_is_a_reason(tmp_path, state):
    save(tmp_path / "checkpoint-9", "model.safetensors", step=9)
    save(tmp_path / "checkpoint-20", "model.safetensors")
    (tmp_path / "checkpoint-20/trainer_state.json").write_text(state)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.folder.name == "checkpoint-9"
    assert "trainer_state.json" in checkpoint.skipped[tmp_path / "checkpoint-20"]


@pytest.mark.parametrize(
    "tracker", ["latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt"]
)
def test_a_checkpoint_that_its_trainer_has_not_finished(tmp_path, tracker):
    for step in (9, 20):
        write(tmp_path, f"ckpts/global_step_{step}/policy/model.safetensors")
    (tmp_path / "ckpts" / tracker).write_text("9\n")
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.folder.name == "global_step_9"
    assert f"{tracker} says 9" in next(iter(checkpoint.skipped.values()))


def test_only_a_step_makes_a_folder_a_checkpoint(tmp_path):
    write(tmp_path, "20250101/model.safetensors", "epoch=1-step=30/model.safetensors")
    write(tmp_path, "run2/model.safetensors", "step_4/model.safetensors")
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.folder.name == "epoch=1-step=30"
    assert not checkpoint.skipped
