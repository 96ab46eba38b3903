# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which user a request belongs to."""

import hmac
from collections.abc import Mapping
from hashlib import sha256

LOCAL_KEY = "tml-local"
LOCAL_USER = "local"


class InvalidKeyError(Exception):
    """The request has no key that this service knows."""


def user_of(key: str | None, api_keys: Mapping[str, str]) -> str:
    """The user of a key. Without configured keys each key is a user of its own."""
    if not api_keys:
        if key is None or key == LOCAL_KEY:
            return LOCAL_USER
        return "key-" + sha256(key.encode()).hexdigest()[:16]
    for known, user in api_keys.items():
        if key is not None and hmac.compare_digest(known.encode(), key.encode()):
            return user
    raise InvalidKeyError("X-API-Key is missing or unknown")
