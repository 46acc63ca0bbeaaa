"""Silence the progress bars and warnings of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


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
        gguf.tqdm = partial(plain, disable=True)
    try:
        yield
    finally:
        if plain is not None:
            gguf.tqdm = plain
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
