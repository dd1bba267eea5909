"""Hooks of mkdocs for the start page, links and languages.

README.md is the start page. Links to files outside of docs/ become plain text or pages. Pages in English and Korean
name their language, and the menu of languages links each to the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "README.ko.md": "ko.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the root of the repository."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_site_links(text, ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page of docs/ with links that the site can follow."""
    path = page.file.abs_src_path
    return with_site_links(markdown, Path(path)) if path and Path(path).is_relative_to(ROOT / "docs") else markdown


def languages(page: str) -> tuple[str, str, str]:
    """Return the language of a page, its English page and its Korean page: the start page if there is none."""
    if page in ("index.md", "ko.md"):
        return ("ko" if page == "ko.md" else "en"), "index.md", "ko.md"
    if page.startswith("walk/"):
        name = page.removeprefix("walk/").removeprefix("ko/")
        return ("ko" if page.startswith("walk/ko/") else "en"), f"walk/{name}", f"walk/ko/{name}"
    return "en", page, "ko.md"


def on_page_context(context: Any, page: Any, config: Any, nav: Any) -> None:
    """Let the menu of languages link to the translation of this page."""
    for choice, target in zip(config.extra["alternate"], languages(page.file.src_uri)[1:], strict=True):
        choice["link"] = target.replace(".md", ".html")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Return the page with its language, which screen readers and browsers need."""
    language = languages(page.file.src_uri)[0]
    return output.replace('<html lang="en"', f'<html lang="{language}"', 1)


def with_site_links(markdown: str, path: Path) -> str:
    """Return the Markdown of a file with relative links to pages of the site; links to other files become their text.

    A link to nothing stays, so that a strict build reports it.
    """
    docs = ROOT / "docs"
    up = "../" * (len(path.relative_to(docs).parts) - 1) if path.is_relative_to(docs) else ""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        file = (path.parent / target).resolve()
        if not file.exists() or (file.is_relative_to(docs) and path.is_relative_to(docs)):
            return match[0]
        if file.is_relative_to(docs):
            return f"[{text}]({file.relative_to(docs).as_posix()}{anchor})"
        page = PAGES.get(file.name) if file.parent == ROOT else None
        return f"[{text}]({up}{page}{anchor})" if page else text

    return _LINK.sub(link, markdown)
