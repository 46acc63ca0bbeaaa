"""A CUDA source as one text: `kernels/<module>.cu` with the project's own headers put in.

One text, so that the compiler needs no include path and a cache key over the text covers the headers too.
"""

from __future__ import annotations

import re
from pathlib import Path

from haq_lab.utils.paths import bundled

INCLUDE = re.compile(r'^#include "(?!host/)([\w./]+)"$', re.MULTILINE)


def module_source(module: str, folder: Path | None = None) -> str:
    """The text of `<module>.cu` with every header in the place of its first `#include`.

    Args:
        module: Name of the source without its suffix, such as `gemm`.
        folder: Where the sources are; the project's own if not given.
    """
    folder = folder or bundled("kernels")
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return INCLUDE.sub(lambda match: expand(match[1]), text)

    return expand(f"{module}.cu")
