"""Numba's compiler as the policies use it: compiled code is kept on disk until a source that is compiled changes.

Numba itself looks only at the file of the function that is called, not at what that function calls in others.
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


FLAGS = {"nnan", "nsz", "arcp", "contract", "reassoc"}  # what lets loops become vector code; infinities stay
FOLDER = cache_folder() / "numba" / _sources()


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """`function`, compiled at its first call for the types it gets. No Python object, no checks of bounds."""
    settings: Any = numba.config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = str(FOLDER)
    try:
        return numba.njit(function, cache=True, fastmath=FLAGS, error_model="numpy", **options)
    finally:
        settings.CACHE_DIR = before


def innermost(function: Callable[..., Any]) -> Any:
    """As `compiled`, for what runs at every visit: it makes no arrays, so none is counted. (Numba counts references to
    every array of a rule's state at every call, which takes longer than the arithmetic.)"""
    return compiled(function, _nrt=False)
