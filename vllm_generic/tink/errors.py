# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Errors that a client is told about."""


class UserError(ValueError):
    """The request cannot be carried out as it stands; the text says what to change."""


class NotFoundError(UserError):
    """What the request names does not exist, or belongs to another user."""


class BusyError(RuntimeError):
    """A queue is full; the client should send the request again later."""
