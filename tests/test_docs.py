"""The documentation as a site, its picture of the events, and the README in Chinese."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    """The code of a page, without comments and white space at the ends of lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    return ["\n".join(line.split("  #")[0].rstrip() for line in block.splitlines()) for block in found]


def test_the_readme_in_chinese_has_the_code_the_events_and_the_handlers_of_the_other() -> None:
    """Its code is what the test of the README runs, up to comments."""
    assert blocks("README.zh-CN.md") == blocks("README.md")
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "README.zh-CN.md")]
    events = [re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) for page in pages]
    assert events[0] == events[1]
    tables = [page.split(title)[1] for page, title in zip(pages, ("## Handlers\n", "## 处理器\n"), strict=True)]
    rows = [[line for line in table.split("\n## ")[0].splitlines() if line.startswith("| ")] for table in tables]
    handlers = [[re.findall(r"`(\w+)`", line) for line in lines] for lines in rows]
    assert handlers[0] == handlers[1]
    assert len(handlers[0]) > 6


def draw_events() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_events", ROOT / "docs" / "draw_events.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_events_has_the_order_in_which_they_fire() -> None:
    module = draw_events()
    names = module.fired()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (ROOT / "docs" / "events.svg").read_text())
    assert [text for text in texts if text in names] == names


class _Links(HTMLParser):
    """The addresses that a page refers to, and the names of its places."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" and value:
                self.places.add(value)


def read(page: Path) -> _Links:
    links = _Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def dead_links(site: Path) -> Iterator[tuple[str, str]]:
    pages = {page: read(page) for page in site.rglob("*.html")}
    for page, links in pages.items():
        for link in links.links if page.name != "404.html" else ():
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            is_there = target.exists() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].places
            )
            if not is_there:
                yield page.name, link


def test_the_site_is_built_without_a_warning_and_has_no_dead_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(dead_links(site)) == []
    reference = (site / "api" / "callbacks.html").read_text()
    assert "The page is in the run directory" in reference  # a docstring
    assert "BestCheckpoint" in reference


def test_a_dead_link_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html">b</a> <a href="#here">c</a> <a href="a.html">d</a>')
    assert list(dead_links(tmp_path)) == [("a.html", "b.html"), ("a.html", "#here")]
