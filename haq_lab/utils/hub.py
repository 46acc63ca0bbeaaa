"""Check whether the Hugging Face hub can be reached.

Without a network its clients would retry for half a minute.
"""

from __future__ import annotations

import functools


@functools.cache
def hub_is_reachable() -> bool:
    """Return whether the hub can be reached. Checks once per process.

    It returns False without a request if the environment sets `HF_HUB_OFFLINE`.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the type depends on the client's HTTP library
        return False
    return True
