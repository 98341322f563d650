"""Files of rows, read and written."""

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.formats.rows import MAX_ROW_BYTES, NAMES, PARQUET_ROWS, Row, read_rows, write_rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


ROWS = [
    {"prompt": f"q{n} ü 字 \U0001f600", "turns": [{"role": "user", "content": "a\nb"}], "n": n} for n in range(2_500)
]


@pytest.mark.parametrize("ending", NAMES)
def test_what_is_written_is_read_again(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    assert write_rows(path, iter(ROWS)) == len(ROWS)
    assert list(read_rows(path)) == [Row(number, row) for number, row in enumerate(ROWS, 1)]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", NAMES)
def test_its_content_says_what_a_file_is_whatever_it_is_called(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    write_rows(path, ROWS[:3])
    other = path.rename(tmp_path / "rows.data")
    assert [row.value for row in read_rows(other)] == ROWS[:3]


def test_how_far_it_is_read_is_told(file: Path) -> None:
    for path in (file, file.with_suffix(".parquet")):
        write_rows(path, ROWS)
        told: list[int] = []
        assert len(list(read_rows(path, watch=told.append))) == len(ROWS)
        assert told == sorted(told)
        assert 0 < told[-1] <= path.stat().st_size


def test_a_table_has_cells_between_tabs_and_quotes_are_text(file: Path) -> None:
    file.write_text('name\tsaid\n"a\tb "c"\nonly one\n\nd\te\n')
    rows = list(read_rows(file, tabs=True))
    assert [row.value for row in rows] == [{"name": '"a', "said": 'b "c"'}, {}, {"name": "d", "said": "e"}]
    assert [(row.number, row.problem) for row in rows] == [
        (2, None), (3, "1 cells where the first line names 2"), (5, None),
    ]  # fmt: skip
    file.write_text("")
    with pytest.raises(DataError, match="is empty"):
        list(read_rows(file, tabs=True))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"chosen": ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"chosen": "\xff"}', "not UTF-8 text"),
    ],
)
def test_a_line_that_is_no_row_says_why_and_the_next_one_is_read(file: Path, line: bytes, problem: str) -> None:
    file.write_bytes(line + b"\n\n" + b'{"a": 1}\n')
    assert [(row.number, row.value, row.problem) for row in read_rows(file)] == [
        (1, {}, problem), (3, {"a": 1}, None),
    ]  # fmt: skip


def test_a_missing_file_and_a_folder_are_named(file: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read data file .*No such file"):
        list(read_rows(file))
    with pytest.raises(DataError, match=r"cannot read data file .*directory"):
        list(read_rows(file.parent))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_a_damaged_file_is_an_error(tmp_path: Path, ending: str, damage: str) -> None:
    path = tmp_path / f"rows{ending}"
    write_rows(path, ({"text": f"{n} {hash(str(n))}"} for n in range(2 * PARQUET_ROWS)))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match="is a damaged"):
        list(read_rows(path))


def test_a_row_without_end_is_not_read_into_memory(file: Path) -> None:
    file.write_bytes(gzip.compress(b"x" * (12 * MAX_ROW_BYTES), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(DataError, match="is this a JSON Lines file"):
        list(read_rows(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_ROW_BYTES


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), begin=st.sampled_from([b"", b"\x1f\x8b", b"PAR1"]), tabs=st.booleans())
def test_garbage_is_a_data_error_or_rows_with_a_problem_and_nothing_else(
    file: Path, content: bytes, begin: bytes, tabs: bool
) -> None:
    file.write_bytes(begin + content)
    try:
        for row in read_rows(file, tabs=tabs):
            assert row.problem or isinstance(row.value, dict)
    except DataError:
        pass


def test_a_file_of_no_known_kind_is_refused_and_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Its name has to end"):
        write_rows(tmp_path / "rows.csv", ROWS[:1])
    kept = tmp_path / "kept.jsonl"
    kept.write_text("before")

    def failing() -> Any:
        yield {"a": 1}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_rows(kept, failing())
    assert kept.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == [kept.name]
    with pytest.raises(DataError, match="cannot write"):
        write_rows(tmp_path / "no" / "rows.jsonl", ROWS[:1])


def test_rows_of_two_kinds_do_not_fit_into_one_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"write \.jsonl instead"):
        write_rows(tmp_path / "rows.parquet", [{"a": "text"}, {"a": [1]}])
    assert write_rows(tmp_path / "none.parquet", []) == 0
    assert list(read_rows(tmp_path / "none.parquet")) == []


def test_unicode_is_written_as_it_is(file: Path) -> None:
    write_rows(file, [{"a": "ü\u2028\u0000"}])
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": "ü\u2028\u0000"}
    assert "ü" in file.read_text(encoding="utf-8")
