# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Any callable that builds a PyTorch module, as a vLLM model.

`ModelRegistry.register_model` hands a callable to `_CallableRegisteredModel`. Its
`load_model_cls` makes a subclass of `CallableModelWrapper`, so that everything in
vLLM that asks questions of a model *class* gets its answer, and nothing is built
before a worker asks for it. `registry_of` lets registrations travel inside the
`ModelConfig`, by whatever means that travels: fork, spawn, Ray.
"""

from .carry import registry_of
from .registration import _CallableRegisteredModel, as_model_cls
from .wrapper import CallableModelWrapper

__all__ = [
    "CallableModelWrapper",
    "_CallableRegisteredModel",
    "as_model_cls",
    "registry_of",
]
