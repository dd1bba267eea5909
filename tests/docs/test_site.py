"""`make docs` builds a site without warnings, and its pages load nothing from other hosts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

mkdocs_commands = pytest.importorskip("mkdocs.commands.build", reason="the extra `docs` is not installed")

ROOT = Path(__file__).parents[2]
LOADED = re.compile(
    r"<(?:script|img|iframe|source|audio|video|link|use|object|embed)\b[^>]*?"
    r"\b(?:src|href|data)=[\"']?(?P<url>[^\"' >]+)"
)
STYLE_URL = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])(https?:)?//")
EXTERNAL = re.compile(r"(?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with (ROOT / "mkdocs.yml").open("rb") as file:
        mkdocs_commands.build(load_config(file, site_dir=str(folder)))
    return folder


def test_every_page_is_built_and_can_be_searched(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    text = " ".join(entry["text"] for entry in index["docs"])
    assert "masked" in text and "마스크" in text


def external(page: str) -> list[str]:
    """What a page loads from other hosts; links that a reader follows are none."""
    found = [match["url"] for match in LOADED.finditer(page) if not re.search(r"rel=[\"']?canonical", match[0])]
    return [url for url in found if EXTERNAL.match(url)]


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        assert external(page.read_text(encoding="utf-8")) == [], page.relative_to(site)
    for style in site.rglob("*.css"):
        assert not STYLE_URL.search(style.read_text(encoding="utf-8")), style.relative_to(site)


def test_korean_pages_say_so_and_the_menu_of_languages_links_to_the_translation(site: Path) -> None:
    for english, korean in (("index.html", "ko.html"), ("walk/08-plateau.html", "walk/ko/08-plateau.html")):
        for name, language in ((english, "en"), (korean, "ko")):
            page = (site / name).read_text(encoding="utf-8")
            assert f'<html lang="{language}"' in page, name
            targets = dict(re.findall(r'<a href="([^"]+)" hreflang="(\w+)" class="md-select__link"', page))
            found = {code: (site / name).parent.joinpath(target).resolve() for target, code in targets.items()}
            assert found == {"en": site / english, "ko": site / korean}, name
    page = (site / "recipes.html").read_text(encoding="utf-8")
    assert '<html lang="en"' in page and 'href="ko.html" hreflang="ko"' in page


def test_a_request_to_another_host_is_found() -> None:
    assert external('<script src="https://unpkg.com/x.js"></script>') == ["https://unpkg.com/x.js"]
    assert external("<link rel=stylesheet href=//fonts.example/css>") == ["//fonts.example/css"]
    assert external('<a href="https://arxiv.org/abs/1810.04805">paper</a> <img src="figures/a.svg">') == []
    assert STYLE_URL.search("@font-face{src:url(https://fonts.example/a.woff2)}")
