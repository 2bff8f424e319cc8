"""README and docs: relative links and anchors resolve, README is short, and its Python compiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
MOST_README_LINES = 120


OUTSIDE = re.compile(r"PAPER\.md|DESIGN( |\.md)|rule [0-9]")
"""What the code was once written from; docs/method.md and docs/invariants.md say it now."""


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    """The page's blocks, and what is within their lines; headings have ids as GitHub makes them."""
    parser = MarkdownIt("gfm-like", {"linkify": False}).use(anchors_plugin, max_level=6)
    blocks = parser.parse(page.read_text("utf-8"))
    return tuple(token for block in blocks for token in (block, *(block.children or ())))


def links(page: Path) -> Iterator[str]:
    """Targets of links and images."""
    for token in tokens(page):
        target = token.attrGet({"link_open": "href", "image": "src"}.get(token.type, ""))
        if isinstance(target, str):
            yield target


def anchors(page: Path) -> set[str]:
    """Ids of the headings."""
    return {str(token.attrGet("id")) for token in tokens(page) if token.type == "heading_open"}


def problem(page: Path, link: str) -> str | None:
    """What is wrong with a link of `page`, or None."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.exists():
        return "there is no such file"
    if not target.is_relative_to(ROOT):
        return "the file is outside the repository"
    if parts.fragment and unquote(parts.fragment) not in anchors(target):
        return f"{target.name} has no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    found = {link: problem(page, link) for link in links(page)}
    assert {link: what for link, what in found.items() if what} == {}


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in links(index)}
    assert linked == set(PAGES) - {README, index}


@pytest.mark.parametrize(
    ("link", "what"),
    [
        ("docs/results.md#lookup", None),
        ("https://example.org/nothing.md#here", None),
        ("docs/results.md#nowhere", "results.md has no such heading"),
        ("docs/nowhere.md", "there is no such file"),
        ("../", "the file is outside the repository"),
        ("#nowhere", "README.md has no such heading"),
    ],
)
def test_a_broken_link_is_found(link: str, what: str | None) -> None:
    assert problem(README, link) == what


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= MOST_README_LINES


def test_python_in_readme_compiles_and_runs_as_a_script() -> None:
    blocks = [t.content for t in tokens(README) if t.type == "fence" and t.info == "python"]
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")  # top-level `async with` is an error here


def test_the_index_lists_every_page() -> None:
    listed = {unquote(link) for link in links(ROOT / "docs" / "index.md")}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= listed


def test_nothing_cites_what_is_not_in_the_repository() -> None:
    """Code and docs refer to pages of docs/ by the names of their sections."""
    sources = [
        path
        for pattern in ("*/**/*.py", "docs/*.md", "README.md")
        for path in ROOT.glob(pattern)
        if path != Path(__file__) and not path.is_relative_to(ROOT / ".venv")
    ]
    citing = [str(path) for path in sources if OUTSIDE.search(path.read_text("utf-8"))]
    assert citing == []
