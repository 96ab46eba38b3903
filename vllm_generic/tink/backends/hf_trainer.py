# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Training by Hugging Face and PEFT: one frozen model, an adapter for each run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from vllm.lora.adapter import WEIGHTS, Adapter
from vllm.lora.adapter_trainer import AdamWParams
from vllm.lora.sites import find_sites
from vllm.model_executor.parallel_context import ParallelContext
from vllm_generic.tink.backends import hf_model
from vllm_generic.tink.backends.base import (
    Batch,
    BatchOutput,
    Datum,
    LoraSpec,
)
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.losses import find_loss, loss_inputs, target_logprobs

OPTIMIZER_FILE = "optimizer.pt"


class HFTrainer:
    """One sequence at a time, so that a run has the same bits alone or among others."""

    max_runs_in_a_pass = 1

    def __init__(self, model: Any) -> None:
        self.base = model
        self.max_length = hf_model.max_length(model)
        self.vocab_size = int(model.config.vocab_size)
        self.architecture = type(model).__name__
        self._layers = hf_model.kinds_of_layers(
            find_sites(model, ParallelContext()), model.get_output_embeddings()
        )
        self._peft: Any = None
        self._names: dict[str, str] = {}
        self._count = 0
        self._optimizers: dict[str, torch.optim.AdamW] = {}

    def create(self, run: str, spec: LoraSpec) -> None:
        targets = hf_model.target_modules(self._layers, spec)
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=targets,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        # PEFT's names may hold no dot, so a run's id cannot be one.
        self._count += 1
        name = f"run{self._count}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            if self._peft is None:
                self._peft = get_peft_model(self.base, config, adapter_name=name)
                self._peft.eval()
            else:
                self._peft.add_adapter(name, config)
        self._names[run] = name
        self._optimizers[run] = torch.optim.AdamW(self._parameters(run), foreach=False)

    def remove(self, run: str) -> None:
        self._peft.delete_adapter(self._names.pop(run))
        del self._optimizers[run]

    def forward_backward(self, jobs: Mapping[str, Batch]) -> dict[str, BatchOutput]:
        return {run: self._run_batch(run, batch) for run, batch in jobs.items()}

    def _run_batch(self, run: str, batch: Batch) -> BatchOutput:
        self._peft.set_adapter(self._names[run])
        logprobs, total = [], 0.0
        with torch.set_grad_enabled(not batch.forward_only):
            for datum in batch.data:
                picked, loss = self._score(datum, batch)
                if not batch.forward_only:
                    loss.backward()
                logprobs.append(picked.detach().cpu().numpy())
                total += loss.item()
        return BatchOutput(logprobs, {"loss:sum": total})

    def _score(self, datum: Datum, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor(datum.tokens, device=self.base.device)
        logits = self._peft(input_ids=tokens[None], use_cache=False).logits[0].cpu()
        picked = target_logprobs(logits, datum.loss_inputs["target_tokens"])
        loss = find_loss(batch.loss_fn)(picked, loss_inputs(datum), batch.loss_config)
        return picked, loss

    def _named_parameters(self, run: str) -> dict[str, torch.nn.Parameter]:
        name = f".{self._names[run]}."
        return {
            key: parameter
            for key, parameter in self._peft.named_parameters()
            if name in key
        }

    def _parameters(self, run: str) -> list[torch.nn.Parameter]:
        return list(self._named_parameters(run).values())

    def optim_step(self, run: str, params: AdamWParams) -> dict[str, float]:
        parameters = self._parameters(run)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=False)
        if params.grad_clip_norm > 0 and grads:
            torch.nn.utils.clip_grads_with_norm_(
                parameters, params.grad_clip_norm, norm, foreach=False
            )
        optimizer = self._optimizers[run]
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate
            group["betas"] = (params.beta1, params.beta2)
            group["eps"] = params.eps
            group["weight_decay"] = params.weight_decay
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"grad_norm:mean": float(norm)}

    def export(self, run: str) -> Adapter:
        name = self._names[run]
        weights = get_peft_model_state_dict(
            self._peft, adapter_name=name, save_embedding_layers=False
        )
        config = self._peft.peft_config[name].to_dict()
        return Adapter.from_peft(config, weights).copy()

    def save_optimizer(self, run: str, folder: Path) -> None:
        torch.save(self._optimizers[run].state_dict(), folder / OPTIMIZER_FILE)

    def load(self, run: str, folder: Path, optimizer: bool) -> None:
        path = folder / OPTIMIZER_FILE
        if optimizer and not path.exists():
            raise UserError("the checkpoint has no optimizer state; load without it")
        weights = load_file(folder / WEIGHTS)
        result: Any = set_peft_model_state_dict(
            self._peft, weights, adapter_name=self._names[run]
        )
        missing = [key for key in result.missing_keys if f".{self._names[run]}." in key]
        if result.unexpected_keys or missing:
            raise UserError(
                "the checkpoint is of an adapter of other layers: it lacks "
                f"{missing[:3]} and has also {result.unexpected_keys[:3]}"
            )
        state: dict[str, Any] | None = None
        if optimizer:
            state = torch.load(path, weights_only=True)
        self._optimizers[run] = torch.optim.AdamW(self._parameters(run), foreach=False)
        if state is not None:
            self._optimizers[run].load_state_dict(state)
        self._optimizers[run].zero_grad(set_to_none=True)
