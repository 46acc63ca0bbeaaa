"""Write the generated parts of the documentation: `python -m docs.tools.pages`, or `make docs`.

A page marks a generated part by two comments, `<!-- generated: NAME -->` and `<!-- end of NAME -->`. The text between
them is replaced. `tests/docs/test_pages.py` fails if a page is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from docs.tools.commands import commands
from docs.tools.families import families
from docs.tools.metrics import metrics
from docs.tools.settings import settings

DOCS = Path(__file__).parents[1]
PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "families": families,
    "metrics": metrics,
    "settings": settings,
}
MARKED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of \2 -->)", flags=re.DOTALL)


def main() -> None:
    """Rewrite the pages that are out of date, and print their names."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(DOCS.parent))


def pages() -> list[Path]:
    """Return the pages that have a generated part."""
    return [page for page in sorted(DOCS.rglob("*.md")) if MARKED.search(page.read_text(encoding="utf-8"))]


def updated(text: str) -> str:
    """Return the text of a page with its generated parts computed anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{_part(found[2]).strip()}\n\n{found[3]}", text)


@cache
def _part(name: str) -> str:
    return PARTS[name]()


if __name__ == "__main__":
    main()
