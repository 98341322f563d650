"""Sheets that people fill in: blind, harmless in a spreadsheet, and read back as what was said."""

import csv
from pathlib import Path

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.sheets import key_of, read_sheet, write_sheet
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.feedback.wins import wins
from rlhf_ray.types import Message, Prompt

NAMES = ("new/policy", "base")


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (Message("user", f"Question {i}?\nÄ second line"),), f"g{i}") for i in range(n)]


def make_sheet(folder: Path, n: int = 40) -> Path:
    sheet = folder / "people.csv"
    assert write_sheet(sheet, prompts(n), [(f"new {i}", f"old {i}") for i in range(n)], samplers=NAMES, seed=0) == n
    return sheet


def rows_of(sheet: Path) -> list[list[str]]:
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def fill(sheet: Path, judge: object) -> None:
    head, *rows = rows_of(sheet)
    with sheet.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *([*row[:4], judge(row)] for row in rows)])  # type: ignore[operator]


def test_a_sheet_says_nothing_about_who_answered(tmp_path: Path) -> None:
    sheet = make_sheet(tmp_path)
    head, *rows = rows_of(sheet)
    assert head == ["row", "dialogue", "answer 1", "answer 2", "better"]
    assert rows[0][1] == "user: Question 0?\nÄ second line"
    assert not any(name in sheet.read_text(encoding="utf-8") for name in NAMES)
    assert 10 < sum(row[2].startswith("new") for row in rows) < 30
    first = sheet.read_bytes()
    make_sheet(tmp_path)
    assert sheet.read_bytes() == first


def test_what_was_filled_in_is_feedback_and_says_who_wins(tmp_path: Path) -> None:
    sheet = make_sheet(tmp_path)

    def judge(row: list[str]) -> str:
        number = int(row[0])
        if number > 36:
            return ""
        if number > 32:
            return "Tie"
        return "1" if row[2].startswith("new" if number <= 24 else "old") else "2"

    fill(sheet, judge)
    with FeedbackStore(tmp_path / "f.db") as store:
        for _ in range(2):  # a second time adds nothing
            store.add(read_sheet(sheet, annotator="ann"))
        assert store.count() == 36
        [duel] = wins(store.iter())
    assert (duel.name, duel.other, duel.judgements, duel.prompts) == ("base", "new/policy", 36, 36)
    assert duel.rate == pytest.approx((8 + 2) / 36)  # 8 lost by the new one, 4 ties
    assert duel.ci95[0] < duel.rate < duel.ci95[1] < 0.5


def test_answers_that_are_alike_or_empty_are_not_asked_about(tmp_path: Path) -> None:
    sheet = tmp_path / "s.csv"
    assert write_sheet(sheet, prompts(3), [("a", "a"), ("a", " "), ("a", "b")], samplers=NAMES, seed=0) == 1
    assert rows_of(sheet)[1][0] == "1"


def test_an_answer_is_no_formula(tmp_path: Path) -> None:
    sheet = tmp_path / "s.csv"
    write_sheet(sheet, prompts(1), [('=HYPERLINK("x")', "+1")], samplers=NAMES, seed=0)
    assert {cell[:2] for cell in rows_of(sheet)[1][2:4]} == {"'=", "'+"}
    fill(sheet, lambda row: "1")
    assert {answer.text for answer in read_sheet(sheet, annotator="a")[0].answers} == {'=HYPERLINK("x")', "+1"}


@pytest.mark.parametrize(
    ("row", "better", "said"),
    [("1", "3", "write 1, 2 or tie"), ("99", "1", "row '99' is not in the key"), ("x", "2", "row 'x'")],
)
def test_what_cannot_be_meant_is_refused_with_its_line(tmp_path: Path, row: str, better: str, said: str) -> None:
    sheet = make_sheet(tmp_path, 2)
    head, first, second = rows_of(sheet)
    with sheet.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, first, [row, *second[1:4], better]])
    with pytest.raises(DataError, match=f"people.csv:3: .*{said}"):
        read_sheet(sheet, annotator="a")


def test_an_empty_sheet_and_one_without_its_key_are_refused(tmp_path: Path) -> None:
    sheet = make_sheet(tmp_path, 2)
    with pytest.raises(DataError, match="holds no judgement"):
        read_sheet(sheet, annotator="a")
    key_of(sheet).unlink()
    with pytest.raises(DataError, match=r"key\.json"):
        read_sheet(sheet, annotator="a")
