"""The pages that are made from the code are those of today's code."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["commands", "configuration"])
def test_a_page_made_from_the_code_is_up_to_date(page: str) -> None:
    made = runpy.run_path(str(DOCS / "make.py"))[page]()
    assert (DOCS / f"{page}.md").read_text(encoding="utf-8") == made, "run `make docs`"


def test_no_key_is_without_a_word_about_it() -> None:
    rows = [line for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    assert len(rows) > 100
    assert not [row for row in rows if not row.split("|")[-2].strip()]


def test_every_page_is_named_in_the_readme() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in readme]
