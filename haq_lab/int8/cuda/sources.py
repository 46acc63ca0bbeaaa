"""Read a CUDA source as one text, with the project's own headers included.

With one text the compiler needs no include path, and a hash of the text covers the headers.
"""

from __future__ import annotations

import re
from pathlib import Path

from haq_lab.utils.paths import bundled

INCLUDE = re.compile(r'^#include "(?!host/)([\w./]+)"$', re.MULTILINE)


def module_source(module: str, folder: Path | None = None) -> str:
    """Return the text of `<module>.cu`, with each header in place of its first `#include`.

    Args:
        module: Name of the source without its suffix, such as `gemm`.
        folder: Folder of the sources; the project's own if None.
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
