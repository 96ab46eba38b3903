# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One adapter: its factors, and its files in PEFT's format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .adapter_config import AdapterConfig
from .sites import Site, targets_of, unknown_module

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# PEFT's names of the factors, and whether they are of an embedding.
A_NAMES = {".lora_A.weight": False, ".lora_embedding_A": True}
B_NAMES = {".lora_B.weight": False, ".lora_embedding_B": True}

# PEFT's choice of layers by their numbers.
LAYERS = ("layers_to_transform", "layers_pattern")


class Adapter:
    """The factors of one adapter, by the name of what each pair changes.

    Args:
        config: ranks, scales and targets.
        factors: A `[rank, inputs]` and B `[rank, outputs]` of each module; B is the
            transpose of PEFT's. Of a parameter that stacks experts, `[experts * rank,
            inputs]` and `[rank * experts, outputs]`, in PEFT's two orders.
        embeddings: which of the modules are embeddings, whose tensors have other names
            in PEFT's files.

    """

    def __init__(
        self,
        config: AdapterConfig,
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
        embeddings: Iterable[str] = (),
    ) -> None:
        self.config = config
        self.factors = factors
        self.embeddings = frozenset(embeddings)

    @classmethod
    def start(
        cls,
        config: AdapterConfig,
        sites: dict[str, Site],
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Adapter:
        """A new adapter that changes nothing yet, with initial values as PEFT's.

        B is zero and A is uniform; of an embedding, A is zero and B is normal. The same
        seed gives the same values on every device and in every layout.
        """
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        factors = {}
        for site in targets_of(config, sites):
            rows = site.factor_rows(config.rank_of(site.name))
            a = torch.zeros(rows, site.inputs, dtype=dtype)
            b = torch.zeros(rows, site.outputs, dtype=dtype)
            if site.is_embedding:
                b.normal_(generator=generator)
            else:
                bound = site.inputs**-0.5  # of kaiming_uniform_(a, a=5**0.5)
                a.uniform_(-bound, bound, generator=generator)
            factors[site.name] = (a, b)
        embeddings = [n for n in factors if sites[n].is_embedding]
        return cls(config, factors, embeddings)

    @classmethod
    def zeros(cls, sites: dict[str, Site], rank: int) -> Adapter:
        """An adapter that changes nothing, of all `sites`, which are layers."""
        factors = {
            name: (torch.zeros(rank, site.inputs), torch.zeros(rank, site.outputs))
            for name, site in sites.items()
        }
        return cls(AdapterConfig(rank), factors)

    def restricted_to(self, sites: dict[str, Site]) -> Adapter:
        """The factors that a pipeline stage with these `sites` needs."""
        factors = {name: f for name, f in self.factors.items() if name in sites}
        return Adapter(self.config, factors, self.embeddings & factors.keys())

    def named_as(self, sites: Iterable[str]) -> Adapter:
        """The same with the names of stacks of experts.

        PEFT's files do not have them: they name a stack by its module, and a second one
        of that module by one more `base_layer`. Which is which follows from the order
        of the model's parameters.

        Args:
            sites: names of all that an adapter can change, in the model's order.

        """
        known = list(sites)
        own_names = {peft: own for own, peft in self._peft_names(known).items()}
        factors = {own_names.get(n, n): pair for n, pair in self.factors.items()}
        places = {name: place for place, name in enumerate(known)}
        order = sorted(factors, key=lambda name: places.get(name, -1))
        factors = {name: factors[name] for name in order}
        return Adapter(self.config, factors, self.embeddings)

    def for_training(self, device: torch.device) -> Adapter:
        """A copy of its values in float32 on `device`, which get gradients."""

        def leaf(factor: torch.Tensor) -> torch.Tensor:
            own = factor.detach().to(device, torch.float32, copy=True)
            return own.requires_grad_()

        factors = {name: (leaf(a), leaf(b)) for name, (a, b) in self.factors.items()}
        return Adapter(self.config, factors, self.embeddings)

    def copy(self) -> Adapter:
        """Its values as they are now, on the CPU, without gradients."""
        factors = {
            name: (a.detach().to("cpu", copy=True), b.detach().to("cpu", copy=True))
            for name, (a, b) in self.factors.items()
        }
        return Adapter(self.config, factors, self.embeddings)

    def parameters(self) -> list[torch.Tensor]:
        return [factor for pair in self.factors.values() for factor in pair]

    def check_fits(self, sites: dict[str, Site]) -> None:
        """Check the factors against the modules of a whole model.

        Raises:
            ValueError: a module is missing, or a shape does not fit it.

        """
        for name, (a, b) in self.factors.items():
            site = sites.get(name)
            if site is None:
                raise unknown_module(name, sites)
            rank = self.config.rank_of(name)
            rows = site.factor_rows(rank)
            expected = [(rows, site.inputs), (rows, site.outputs)]
            if [tuple(a.shape), tuple(b.shape)] != expected:
                raise ValueError(
                    f"The adapter's factors for {name} have shapes {list(a.shape)} "
                    f"and {list(b.shape[::-1])}; expected {list(expected[0])} and "
                    f"{list(expected[1][::-1])}, for rank {rank}."
                )

    # ---- PEFT's format ---------------------------------------------------------------

    def _peft_names(self, names: Iterable[str]) -> dict[str, str]:
        """PEFT's names of the stacks of experts among `names`, in the model's order.

        PEFT wraps the module once for each of its stacks, the first one inside.
        """
        stacks: dict[str, list[str]] = {}
        for name in filter(self.config.targets_parameter, names):
            stacks.setdefault(name.rpartition(".")[0], []).append(name)
        return {
            name: f"{module}{'.base_layer' * (len(own) - 1 - place)}"
            for module, own in stacks.items()
            for place, name in enumerate(own)
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of PEFT's file, by PEFT's names."""
        tensors = {}
        peft_names = self._peft_names(self.factors)
        for name, (a, b) in self.factors.items():
            index = int(name in self.embeddings)
            a_name, b_name = list(A_NAMES)[index], list(B_NAMES)[index]
            peft_name = peft_names.get(name, name)
            tensors[f"{PREFIX}{peft_name}{a_name}"] = a.detach().clone()
            tensors[f"{PREFIX}{peft_name}{b_name}"] = b.detach().t().contiguous()
        return tensors

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write PEFT's two files; a reader never sees a half-written one."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.cpu() for name, t in self.state_dict().items()}
        save_file(tensors, path / f".{WEIGHTS}", metadata={"format": "pt"})
        config = json.dumps(self.config.to_peft(self.factors), indent=2)
        (path / f".{CONFIG}").write_text(config)
        for name in (WEIGHTS, CONFIG):
            (path / f".{name}").replace(path / name)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Read PEFT's two files.

        Raises:
            FileNotFoundError: one of them is not there.
            ValueError: they hold something that is not taken.

        """
        path = Path(folder)
        config = json.loads((path / CONFIG).read_text())
        return cls.from_peft(config, load_file(path / WEIGHTS))

    @classmethod
    def from_peft(
        cls, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]
    ) -> Adapter:
        """Of what PEFT's two files hold.

        Raises:
            ValueError: something in them is not taken, or a factor has no partner.

        """
        a: dict[str, torch.Tensor] = {}
        b: dict[str, torch.Tensor] = {}
        embeddings: set[str] = set()
        other: list[str] = []
        for key, tensor in tensors.items():
            for names, found in ((A_NAMES, a), (B_NAMES, b)):
                end = next((end for end in names if key.endswith(end)), None)
                if end is not None:
                    name = key.removeprefix(PREFIX).removesuffix(end)
                    found[name] = tensor
                    if names[end]:
                        embeddings.add(name)
                    break
            else:
                other.append(key)
        other += sorted(a.keys() ^ b.keys())
        if other:
            raise ValueError(
                f"The adapter's file has {', '.join(other[:4])}, which is not taken; "
                "expected pairs of lora_A and lora_B."
            )
        factors = {name: (a[name], b[name].t().contiguous()) for name in a}
        # The tensors say which layers they are of.
        chosen = {key: config[key] for key in config if key not in LAYERS}
        return cls(AdapterConfig.from_peft(chosen), factors, embeddings)
