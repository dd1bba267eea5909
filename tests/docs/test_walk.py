"""The annotated walk is true: code, outputs, figures and translation."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


walk = load(ROOT / "benchmarks" / "walk.py")


def pages() -> dict[str, str]:
    return {name: (walk.WALK / name).read_text(encoding="utf-8") for name in walk.chapters()}


@pytest.fixture(scope="module")
def rerun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages after one session of all chapters."""
    return walk.run(pages(), tmp_path_factory.mktemp("walk"))[0]


def test_the_walk_prints_what_it_shows_and_its_translation_is_current(rerun: dict[str, str]) -> None:
    assert walk.problems(pages(), rerun) == []


def test_every_chapter_shows_code_runs_it_and_ends_with_a_change() -> None:
    for name, page in pages().items():
        if name != "index.md":
            found = walk.blocks(page)
            assert any(block.marker for block in found), f"{name} quotes no code of the source"
            assert any(block.is_run for block in found), f"{name} runs nothing"
            assert page.rindex("\n## ") == page.index("\n## Change one thing\n"), f"{name} doesn't end with a change"


def test_the_korean_readme_is_a_translation_of_the_current_one() -> None:
    page, korean = (path.read_text(encoding="utf-8") for path in (walk.README, walk.README_KO))
    assert walk.translation_problems(page, korean, "README.md", "README.ko.md") == []


def test_every_figure_is_shown_and_exists() -> None:
    shown = {figure for page in pages().values() for figure in walk.outline(page) if figure.endswith(".svg")}
    shown -= {"plot.svg"}  # of studies
    assert shown == {f"{name}.svg" for name in walk.FIGURES}
    for name in shown:
        assert (walk.WALK / "figures" / name).read_text(encoding="utf-8").lstrip().startswith("<?xml")


# That these tests find what is wrong ----------------------------------------------------------------------------------

PAGE = """# A page

<!-- source: objectives/mlm.py MaskedLMObjective.corrupt -->
```python title="objectives/mlm.py: MaskedLMObjective.corrupt"
def corrupt(self, batch: Batch, seed: int) -> MaskedBatch:
    return self.mask(batch, seed)
```

```python
print("a loss of", 1.2345, "after", 3, "steps")
```

```text title="output"
a loss of 1.2345 after 3 steps
```
"""


def differences(page: str, folder: Path) -> list[str]:
    return walk.differences(page, walk.run({"page": page}, folder)[0]["page"])


def test_a_true_page_has_no_difference(tmp_path: Path) -> None:
    assert differences(PAGE, tmp_path) == []
    assert differences(PAGE.replace("1.2345 after 3 steps\n```", "1.2346 after 3 steps\n```"), tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return self.mask(batch, seed)", "return self.mask(batch, 17)"),
        ("1.2345 after 3 steps\n", "1.3 after 3 steps\n"),
        ("after 3 steps\n", "after 4 steps\n"),
        ("a loss of 1.2345 after 3 steps\n```", "```"),
    ],
)
def test_a_changed_line_is_found(tmp_path: Path, old: str, new: str) -> None:
    assert len(differences(PAGE.replace(old, new), tmp_path)) == 1


@pytest.mark.parametrize("name", ["objectives/mlm.py MaskedLMObjective.corupt", 'objectives/mlm.py "def nothing"'])
def test_a_quotation_of_nothing_is_an_error(name: str) -> None:
    with pytest.raises(LookupError):
        walk.quoted(f"<!-- source: {name} -->")


def test_lines_between_ranges_are_marked_as_left_out() -> None:
    _, lines = walk.quoted('<!-- source: objectives/mlm.py MaskedLMObjective.mask "def mask" "return" -->')
    assert [line.strip() for line in lines][1:] == [
        "...",
        "return masked_batch(batch, corrupted_T, positions_M, ids_T[positions_M])",
    ]
    assert lines[0].startswith("def mask(")


def test_a_page_that_changed_without_its_translation_is_found() -> None:
    original = "# Title\n\nA sentence.\n\n```python\nprint(1)\n```\n"
    korean = walk.translation("# 제목\n\n문장.\n\n```\n```\n", original, translated=True)
    assert "print(1)" in korean and walk.STAMP.match(korean)[1] == walk.prose_digest(original)
    assert walk.prose_digest(original.replace("sentence", "word")) != walk.prose_digest(original)
    assert walk.prose_digest(original.replace("print(1)", "print(2)")) == walk.prose_digest(original)
    with pytest.raises(ValueError, match="zip"):
        walk.translation("# 제목\n", original, translated=True)
