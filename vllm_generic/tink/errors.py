# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Errors that a client is told about."""


class UserError(ValueError):
    """The request cannot be carried out as it stands; the text says what to change."""


class NotFoundError(UserError):
    """What the request names does not exist, or belongs to another user."""


class BusyError(RuntimeError):
    """A queue is full; the client should send the request again later."""


def require_base_model(asked: str | None, served: str) -> None:
    """Raise UserError unless a client asks for the model that is served."""
    if asked != served:
        raise UserError(
            f"base_model {asked!r} is not served here; this service has {served!r}"
        )
