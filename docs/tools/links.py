"""A hook of mkdocs: pages outside `docs/` join the site, and links are those of the repository.

A link such as `../../experiments/rotation.md` works on a page in the repository, and here it is rewritten for the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

# What the site shows besides `docs/`, in the same folders as in the repository.
ALSO = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "experiments/*.md", "experiments/*.png", "experiments/*.csv")
NOTEBOOKS = "notebooks/*.ipynb"
STUDIES = "experiments/*.md"  # in the navigation, at the entry `STUDIES` of mkdocs.yml
LINK = re.compile(r"(\]\()([^)\s:#]+)([)#])")


def on_config(config: Any) -> Any:
    """Put the pages of the lab notebook into the navigation, the list of them first."""
    root = Path(config.config_file_path).parent
    pages = sorted(root.glob(STUDIES), key=lambda page: (page.stem != "README", page.stem))
    for part in config.nav:
        for title in part:
            if part[title] == "STUDIES":
                part[title] = [page.relative_to(root).as_posix() for page in pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside `docs/`."""
    root = Path(config.config_file_path).parent
    for pattern in (*ALSO, NOTEBOOKS):
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite a page's links from the repository's folders to those of the site."""
    root = Path(config.config_file_path).parent
    place = Path(page.file.abs_src_path).relative_to(root).as_posix()
    return relinked(markdown, place, page.file.src_uri)


def relinked(markdown: str, place: str, page: str) -> str:
    """Return a page whose links are relative to its place in the site.

    Args:
        markdown: Text of the page.
        place: Path of the page in the repository, such as `docs/guides/serve.md`.
        page: Path of the page in the site, such as `guides/serve.md`.

    Example:
        >>> relinked("[page](../../experiments/rotation.md)", "docs/guides/serve.md", "guides/serve.md")
        '[page](../experiments/rotation.md)'
    """

    def rewrite(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        within = target.removeprefix("docs/")
        return before + posixpath.relpath(within, posixpath.dirname(page) or ".") + after

    return LINK.sub(rewrite, markdown)
