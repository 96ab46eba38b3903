# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Any callable that builds a PyTorch module, as a vLLM model.

`ModelRegistry.register_model` hands a callable to `_CallableRegisteredModel`. Its
`load_model_cls` makes a subclass of `CallableModelWrapper`, so that everything in
vLLM that asks questions of a model *class* gets its answer, and nothing is built
before a worker asks for it. `registrations_for` puts registrations into the
`ModelConfig`, with which they reach processes that are forked, spawned or Ray's.
"""

from .carry import registrations_for, registry_of
from .checks import CALLBACK_VERSION
from .registration import _CallableRegisteredModel, _NamedRegisteredModel
from .wrapper import CallableModelWrapper

__all__ = [
    "CALLBACK_VERSION",
    "CallableModelWrapper",
    "_CallableRegisteredModel",
    "_NamedRegisteredModel",
    "registrations_for",
    "registry_of",
]
