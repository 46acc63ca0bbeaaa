"""Check whether the Hugging Face hub can be reached, and silence transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager


@functools.cache
def hub_is_reachable() -> bool:
    """Return whether the hub can be reached. Checks once per process.

    Without a network, the hub's clients would retry for half a minute. The function returns False at once if the
    environment sets `HF_HUB_OFFLINE`.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the type depends on the client's HTTP library
        return False
    return True


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings within the block."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    plain = getattr(gguf, "tqdm", None)  # the bars of this module ignore the setting

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if plain is not None:
        gguf.tqdm = functools.partial(plain, disable=True)
    try:
        yield
    finally:
        if plain is not None:
            gguf.tqdm = plain
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
