"""The pages that are made from the code are those of today's code."""

import runpy
from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf_ray.config import Config, known_keys
from rlhf_ray.config.fits import TRAINER_ARGUMENTS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["commands", "configuration"])
def test_a_page_made_from_the_code_is_up_to_date(page: str) -> None:
    made = runpy.run_path(str(DOCS / "make.py"))[page]()
    assert (DOCS / f"{page}.md").read_text(encoding="utf-8") == made, "run `make docs`"


def test_no_key_is_without_a_word_about_it() -> None:
    rows = [line for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    assert len(rows) > 100
    assert not [row for row in rows if not row.split("|")[-2].strip()]


def test_every_choice_of_an_algorithm_is_a_row_of_the_page_on_algorithms() -> None:
    page = (DOCS / "algorithms.md").read_text(encoding="utf-8")
    choices = {"method", "ppo.advantage", "ppo.loss", "ppo.average", "ppo.correction", "ppo.reward_norm", "ppo.whiten"}
    for key in choices | {"ppo.kl.estimator", "ppo.kl.where", "ppo.critic_from", "ppo.credit"}:
        section: Any = Config
        for name in key.split("."):
            field = section.model_fields[name]
            section = field.annotation
        assert key == "method" or f"`{key}" in page, key
        plain = {"ppo.critic_from": set(), "ppo.credit": {"to_go"}}.get(key, set(get_args(field.annotation)))
        assert not [choice for choice in plain if f"`{choice}`" not in page and f"={choice}`" not in page], key
    assert not [name for name in TRAINER_ARGUMENTS if f"`{name}`" not in page]
    settings = [key for key in known_keys(Config) if key.startswith("ppo.kl.")]
    assert not [key for key in settings if f"`{key}`" not in page and key not in {"ppo.kl.horizon", "ppo.kl.coef"}]


def test_every_page_is_named_in_the_readme() -> None:
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in readme]
