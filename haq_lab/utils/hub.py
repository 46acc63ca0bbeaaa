"""Whether the Hugging Face hub can be asked: without a network its clients would try for half a minute."""

from __future__ import annotations

import functools


@functools.cache
def hub_answers() -> bool:
    """Looked at once a process; False too where the user's environment says that the hub is not to be asked."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever the client is built on
        return False
    return True
