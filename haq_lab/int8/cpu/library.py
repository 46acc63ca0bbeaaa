"""Load the compiled CPU kernels, and choose the instruction set that they use.

The best instruction set of the CPU is used. `HAQ_LAB_ISA` or `forced_isa` selects a lower one.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from haq_lab.int8.cpu.build import BuildError, build
from haq_lab.utils.errors import UserError, nearest

_forced: str | None = None


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and "", or None and the reason why it is not available."""
    try:
        lib = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        return None, str(error)
    i32, i64, f32, ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    for name, result, arguments in (
        ("haq_level_name", ctypes.c_char_p, (i32,)),
        ("haq_level_supported", i32, (i32,)),
        ("haq_packed_bytes", i64, (i64, i64)),
        ("haq_pack", None, (ptr, i64, i64, i64, ptr, i32)),
        ("haq_packed4_bytes", i64, (i64, i64)),
        ("haq_pack4", None, (ptr, i64, i64, i64, ptr, i32)),
        ("haq_linear4", i32, (i32, i32, ptr, i32, i64, i64, ptr, i64, i64, ptr, ptr, ptr, f32, i64, ptr, i32)),
        ("haq_linear", i32, (i32, i32, ptr, i32, i64, i64, ptr, i64, ptr, ptr, f32, i64, ptr, i32)),
        ("haq_quantize", i32, (i32, i32, ptr, i32, i64, i64, f32, i64, ptr, ptr)),
        ("haq_silu_mul", None, (i32, i32, ptr, i32, i64, i64, ptr)),
        ("haq_float_linear", None, (i32, i32, ptr, i64, i64, ptr, i32, i64, ptr)),
        ("haq_decoder_layers", i32, (i32, i32, ptr, i64, ptr, ptr, i64, ptr, ptr, ptr, ptr, i64, i64)),
        ("haq_attention", i32, (i32, i32, ptr, i64, ptr, ptr, ptr, i64, ptr, ptr, ptr, ptr, i64, i64)),
        ("haq_route", i32, (i32, i32, ptr, ptr, i64, i64, ptr, ptr, ptr)),
        ("haq_expert", i32, (i32, i32, ptr, ptr, i64, i64, i64, *(ptr, ptr, i64) * 3, f32, i64, ptr)),
        ("haq_read", ctypes.c_uint64, (i32, i32, ptr, i64)),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib, ""


def available() -> bool:
    """Return whether the kernels can be used. The first call may compile them, which takes some seconds."""
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Return why `available()` is False, or an empty string if it is True."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """Return the compiled kernels. Raises UserError if they are not available."""
    lib, reason = _load()
    if lib is None:
        raise UserError(f"The native CPU kernels are not available: {reason} Use backend=reference.")
    return lib


@cache
def _levels() -> dict[str, int]:
    lib = library()
    names: list[str] = []
    while name := lib.haq_level_name(len(names)):
        names.append(name.decode())
    return {name: level for level, name in enumerate(names) if lib.haq_level_supported(level)}


def isas() -> tuple[str, ...]:
    """Return the instruction sets that this CPU supports, slowest first."""
    return tuple(_levels())


def isa() -> str:
    """Return the instruction set in use: that of `forced_isa`, else `HAQ_LAB_ISA` at first use, else the best."""
    if _forced is not None:
        return _forced
    return next(name for name, level in _levels().items() if level == _default_level())


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Use one instruction set within a `with` statement, in all threads. Meant for tests and measurements.

    Args:
        name: One of `isas()`.

    Raises:
        UserError: This CPU does not support it.
    """
    global _forced
    _level_of(name, "forced_isa")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _level_of(name: str, setting: str) -> int:
    if name not in _levels():
        choices = ", ".join(isas())
        raise UserError(
            f"{setting}: '{name}' is not supported by this CPU{nearest(name, isas())}. Choose one of {choices}."
        )
    return _levels()[name]


@cache
def _default_level() -> int:
    return _level_of(os.environ.get("HAQ_LAB_ISA") or isas()[-1], "HAQ_LAB_ISA")


def level() -> int:
    """Return the library's number of the instruction set in use."""
    return _default_level() if _forced is None else _levels()[_forced]
