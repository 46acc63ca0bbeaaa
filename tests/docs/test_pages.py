"""Generated parts of the documentation are up to date, and local links lead to files and headings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from documented import ROOT
from pydantic import Field

from docs.tools.links import relinked
from docs.tools.pages import MARKED, PARTS, pages, updated
from docs.tools.settings import settings, values
from docs.tools.tables import table
from haq_lab.config.help import GROUPS, options
from haq_lab.measure.metrics import METRICS

TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "experiments").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _is_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert updated(text) == text, "run `make docs`, or `python -m docs.tools.pages`"


@pytest.mark.parametrize("page", [page for page in pages() if page.stem != "models"], ids=lambda page: page.stem)
def test_a_generated_page_is_up_to_date(page):
    _is_up_to_date(page)


@pytest.mark.slow
def test_the_table_of_models_is_up_to_date():
    _is_up_to_date(ROOT / "docs" / "reference" / "models.md")


def test_each_part_is_on_one_page():
    assert sorted(name for page in pages() for _, name, _ in MARKED.findall(page.read_text())) == sorted(PARTS)


def test_an_outdated_part_is_replaced():
    outdated = "# Title\n<!-- generated: metrics -->\nold\n<!-- end of metrics -->\nText.\n"
    text = updated(outdated)
    assert "old" not in text
    assert text.startswith("# Title\n<!-- generated: metrics -->\n\n| name |")
    assert text.endswith("|\n\n<!-- end of metrics -->\nText.\n")


def test_every_option_and_metric_is_listed():
    text = settings()
    assert [name for group in GROUPS for name in options(group) if f"| `{name}` |" not in text] == []
    metrics = (ROOT / "docs/reference/metrics.md").read_text()
    assert [name for name in METRICS if f"| `{name}` |" not in metrics] == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (bool, "`true`, `false`"),
        (Literal["token", 8] | None, "`token`, `8`, `null`"),
        (Annotated[float, Field(ge=0, le=1)], "number from 0 to 1"),
        (Annotated[int, Field(ge=1, multiple_of=32)] | None, "integer at least 1 and a multiple of 32, `null`"),
        (list[str], "list of text"),
    ],
)
def test_types_in_words(kind, text):
    assert values(kind) == text


def test_a_table_escapes_bars_and_drops_empty_columns():
    assert table(["a", "b"], [["x | y", ""], ["z", ""]]) == "| a |\n|---|\n| x \\| y |\n| z |"


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    ("link", "place", "page", "expected"),
    [
        ("../../experiments/x.md", "docs/guides/a.md", "guides/a.md", "../experiments/x.md"),
        ("../start/b.md#part", "docs/guides/a.md", "guides/a.md", "../start/b.md#part"),
        ("../docs/start/b.md", "experiments/x.md", "experiments/x.md", "../start/b.md"),
        ("docs/start/b.md", "CHANGELOG.md", "CHANGELOG.md", "start/b.md"),
        ("https://example.org/a.md", "docs/a.md", "a.md", "https://example.org/a.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(link, place, page, expected):
    assert relinked(f"[text]({link})", place, page) == f"[text]({expected})"
