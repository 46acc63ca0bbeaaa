"""Where the kernels are, and a CUDA source as one text: `kernels/<module>.cu` with the project's own headers put in.

One text, so that the compiler needs no include path and a cache key over the text covers the headers too.
"""

from __future__ import annotations

import re
from pathlib import Path

from haq_lab.paths import bundled

INCLUDE = re.compile(r'^#include "(?!host/)([\w./]+)"$', re.MULTILINE)


def kernel_folder() -> Path:
    """`kernels/` beside the package in a checkout, inside it in an installed wheel."""
    return bundled("kernels")


def module_source(module: str, folder: Path | None = None) -> str:
    """The text of `<module>.cu` with every header in the place of its first `#include`.

    Args:
        module: Name of the source without its suffix, such as `gemm`.
        folder: Where the sources are; `kernel_folder()` if not given.
    """
    folder = folder or kernel_folder()
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return INCLUDE.sub(lambda match: expand(match[1]), text)

    return expand(f"{module}.cu")
