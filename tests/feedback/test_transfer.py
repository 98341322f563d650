"""Files into a store and back."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.config import DataConfig
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.formats import FORMATS
from rlhf_ray.feedback.formats.mqm import MARK
from rlhf_ray.feedback.formats.rows import read_rows
from rlhf_ray.feedback.schema import Feedback, Ranking
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.feedback.transfer import Found, export_feedback, read_feedback
from tests.feedback.formats.examples import anything, feedback

SHARED = Path(__file__).parents[3] / "shared/data"
PAIR = {"prompt": "Help me", "chosen": "Gladly.", "rejected": "No."}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "choices.jsonl"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "f.db") as opened:
        yield opened


def read(path: Path, format: str = "preference", **more: Any) -> list[Feedback]:
    return list(read_feedback(path, format, Found(), **more))


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"needs {name} beside the project")
    return SHARED / name


def test_a_bad_row_stops_the_import_with_its_line_and_nothing_is_written(file: Path, store: FeedbackStore) -> None:
    write(file, *[PAIR] * 1_500, {"prompt": "q"}, PAIR)
    with pytest.raises(DataError) as error:
        store.add_all(read_feedback(file, "preference", Found()))
    assert str(error.value).startswith(f"{file}:1501: no text under 'chosen': ")
    assert "--on-error skip" in str(error.value)
    assert "data.on_bad_row=skip" in str(error.value)
    assert store.count() == 0


def test_skipped_rows_are_counted_by_reason_and_reported_row_by_row(file: Path) -> None:
    write(file, PAIR, [1], {"prompt": "q"}, PAIR | {"chosen": "No."}, {"prompt": "p"})
    found, report = Found(), file.with_name("report.jsonl")
    items = list(read_feedback(file, "preference", found, on_bad_row="skip", report=report))
    assert (len(items), found.rows, found.judgements) == (1, 5, 1)
    assert found.skipped == Counter(
        {"no text under 'chosen'": 2, "not a JSON object": 1, "the two answers are the same": 1}
    )
    assert found.describe().startswith("1 judgements; 4 of 5 rows skipped (2 no text under 'chosen', ")
    *rows, last = (json.loads(line) for line in report.read_text().splitlines())
    assert [row["row"] for row in rows] == [2, 3, 4, 5]
    assert last == {"rows": 5, "judgements": 1, "skipped": dict(found.skipped)}


@pytest.mark.parametrize("rows", [[], [{"prompt": "q"}]])
def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(file: Path, rows: list[Any]) -> None:
    with pytest.raises(DataError, match=r"holds no usable feedback in format 'preference'"):
        read(write(file, *rows), on_bad_row="skip")


def test_a_format_that_is_not_there_or_only_written_is_named_with_those_that_are(file: Path) -> None:
    with pytest.raises(DataError, match=r"no format 'pairs' here; there are feedback, preference"):
        read(write(file, PAIR), "pairs")
    with pytest.raises(DataError, match="no format 'prompt-only'"):
        read(file, "prompt-only")
    with pytest.raises(DataError, match="no format 'mqm'"):
        export_feedback(file, [], "mqm")


def test_reading_again_adds_nothing_but_a_choice_made_twice_counts_twice(file: Path, store: FeedbackStore) -> None:
    write(file, PAIR, PAIR | {"chosen": "Yes."}, PAIR)
    assert [store.add_all(read(file)) for _ in range(2)] == [3, 0]
    assert store.count() == 3


def test_who_is_not_named_is_who_was_told(file: Path) -> None:
    write(file, PAIR)
    (item,) = read(file)
    assert (item.annotator, {answer.sampler for answer in item.answers}) == ("import-preference", {"import-preference"})
    (item,) = read(file, annotator="crowd", sampler="gpt-2")
    assert (item.annotator, {answer.sampler for answer in item.answers}) == ("crowd", {"gpt-2"})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(items=st.lists(anything(), min_size=1, max_size=5, unique_by=lambda item: item.id))
def test_our_own_format_loses_nothing(file: Path, items: list[Feedback]) -> None:
    assert export_feedback(file, items, "feedback").rows == len(items)
    assert read(file, "feedback") == items


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_an_export_is_read_by_its_own_format(tmp_path: Path, ending: str) -> None:
    items = [feedback([f"q{n}"], ["a", "b", "c"], ranking=Ranking(ranks=(1, 2, 2))) for n in range(3)]
    for format, rows in {"preference": 6, "implicit": 6, "hh": 6}.items():
        path = tmp_path / f"{format}{ending}"
        written = export_feedback(path, items, format, conversational=format != "hh")
        assert (written.rows, written.describe()) == (rows, f"{rows} rows; nothing left out")
        assert len(read(path, format)) == rows


def test_what_a_format_has_no_words_for_is_left_out_and_counted(file: Path) -> None:
    items = [
        feedback(["q"], ["a", "b"], ranking=Ranking(ranks=(1, 1))),
        feedback(["q", "a", "q"], ["a", "b"], ranking=Ranking(ranks=(1, 2))),
        feedback(["q"], ["a", "b"], ranking=Ranking(ranks=(1, 2))),
    ]
    written = export_feedback(file, items, "preference")
    assert (written.rows, written.left_out.total()) == (1, 2)
    assert "1 a ranking that prefers none" in written.describe()


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("shp", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": -1}),
        ("argilla", {"fields": {"prompt": "q", "answer": "a"}, "responses": [{"values": {"n": float("nan")}}]}),
        ("argilla", {"fields": {"prompt": "q", "answer": "a"}, "responses": [{"values": {"": 3}}]}),
        ("argilla", {"fields": {"prompt": "q", "answer": "a"}, "responses": [{"values": {"why": " " * 9_000 + "x"}}]}),
    ],
)
def test_a_number_or_a_text_that_cannot_be_kept_is_a_bad_row(file: Path, format: str, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"choices\.jsonl:1: "):
        read(write(file, row), format)


def test_a_prompt_is_written_once(file: Path) -> None:
    items = [feedback(["q"], ["a", "b"], ranking=Ranking(ranks=(1, 2))) for _ in range(3)]
    assert export_feedback(file, items, "prompt-only").rows == 1


def test_a_runs_config_knows_every_format_that_can_be_read() -> None:
    named = set(get_args(DataConfig.model_fields["format"].annotation))
    assert named == {name for name, kind in FORMATS.items() if kind.read}


def test_hh_is_imported_with_its_nine_odd_rows_named(store: FeedbackStore) -> None:
    path, found = shared("hh-harmless-base-test.jsonl.gz"), Found()
    assert store.add_all(read_feedback(path, "hh", found, on_bad_row="skip")) == 2_303
    assert found.rows == 2_312
    assert found.skipped == Counter({"the two dialogues differ before the last answer": 5, "empty chosen answer": 4})
    with pytest.raises(DataError, match=r"\.jsonl\.gz:\d+: "):
        read(path, "hh")


PUBLISHED = {
    "ref": 0.91, "Facebook-AI": 1.06, "Online-W": 1.12, "VolcTrans-AT": 1.24, "metricsystem3": 1.44,
    "VolcTrans-GLAT": 1.49, "HuaweiTSC": 1.50, "metricsystem1": 1.63, "metricsystem2": 1.69, "metricsystem5": 1.72,
    "UEdin": 1.77, "metricsystem4": 1.78, "eTranslation": 1.96, "Nemo": 2.14,
}  # fmt: skip
"""Mean penalty of each system, WMT 2021, TED, English to German."""


def test_mqm_gives_the_table_that_its_authors_published_and_no_mark_reaches_the_store(store: FeedbackStore) -> None:
    found = Found()
    store.add_all(read_feedback(shared("mqm_ted_ende.tsv.gz"), "mqm", found))
    assert (found.rows, store.stats().by_kind["rating"]) == (7_406, 7_406)
    assert store.stats().by_kind["comment"] == 4_031
    means = {tally.name: -tally.mean for tally in store.stats().by_sampler if tally.mean is not None}
    assert means == {name: pytest.approx(penalty, abs=0.01) for name, penalty in PUBLISHED.items()}
    assert sorted(means, key=lambda name: means[name]) == list(PUBLISHED)
    assert not [item.id for item in store.iter() if MARK.search(item.model_dump_json())]


MEASURED = """
import re, sys
from pathlib import Path
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.feedback.transfer import Found, read_feedback
with FeedbackStore(sys.argv[2]) as store:
    new = store.add_all(read_feedback(Path(sys.argv[1]), "preference", Found()))
print(new, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""
"""Not `ru_maxrss`, which begins with the size of whoever started the process."""


def imported_in_mib(tmp_path: Path, rows: int) -> float:
    path = tmp_path / f"{rows}.jsonl"
    with path.open("w") as out:
        for n in range(rows):
            out.write(json.dumps({"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": "No."}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, path, tmp_path / f"{rows}.db"],
        capture_output=True, text=True, timeout=900, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    new, mib = done.stdout.split()
    assert int(new) == rows
    return float(mib)


def test_memory_stays_flat(tmp_path: Path) -> None:
    few, more = imported_in_mib(tmp_path, 1_000), imported_in_mib(tmp_path, 20_000)
    assert more - few < 25
    assert more < 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_rows_are_imported_in_under_300_mib(tmp_path: Path) -> None:
    assert imported_in_mib(tmp_path, 1_000_000) < 300


def test_rows_keep_their_order(file: Path) -> None:
    write(file, *[PAIR | {"prompt": f"q{n}"} for n in range(50)])
    assert [item.messages[0].content for item in read(file)] == [f"q{n}" for n in range(50)]
    assert len(list(read_rows(file))) == 50
