# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Numbers for Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)


class Metrics:
    """All metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.trained_tokens = Counter(
            "tink_trained_tokens", "Tokens of training batches", registry=self.registry
        )
        self.sampled_tokens = Counter(
            "tink_sampled_tokens", "Tokens that were drawn", registry=self.registry
        )
        self.prompt_tokens = Counter(
            "tink_prompt_tokens", "Tokens of prompts", registry=self.registry
        )
        self.rejected = Counter(
            "tink_rejected_requests",
            "Requests answered with 429",
            registry=self.registry,
        )
        self._operations = Histogram(
            "tink_operation_seconds",
            "Time of an operation in the trainer or the sampler",
            ["kind"],
            registry=self.registry,
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        gauge = Gauge(name, text, registry=self.registry)
        gauge.set_function(value)

    def operation(self, kind: str, seconds: float) -> None:
        self._operations.labels(kind).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
