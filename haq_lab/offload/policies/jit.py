"""Compile the policies' loops with numba and store the compiled code on disk.

The name of the folder contains a hash of all compiled sources. Numba itself checks only the file of the function that
is called, not the files of the functions that it calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from haq_lab.utils.paths import cache_folder


def _sources() -> str:
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(
        b"".join(text for text in texts if b"@compiled" in text or b"@innermost" in text)
    ).hexdigest()[:16]


FLAGS = {"nnan", "nsz", "arcp", "contract", "reassoc"}  # allow vector code, but keep infinities
FOLDER = cache_folder() / "numba" / _sources()


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Return `function`, compiled at its first call, without Python objects and bounds checks."""
    settings: Any = numba.config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = str(FOLDER)
    try:
        return numba.njit(function, cache=True, fastmath=FLAGS, error_model="numpy", **options)
    finally:
        settings.CACHE_DIR = before


def innermost(function: Callable[..., Any]) -> Any:
    """Compile a function that runs at every visit and creates no arrays.

    Numba otherwise counts references to every array of a rule's state at every call, which takes longer than the
    arithmetic.
    """
    return compiled(function, _nrt=False)
