"""Files of rows: JSON Lines, plain or gzip, Parquet, and tables with tabs; read and written a row at a time.

What a file is, is recognised by its content where it is read, and told by its name where it is written.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf_ray.errors import DataError

MAX_ROW_BYTES = 8_000_000
PARQUET_ROWS = 1_000
"""Read and written at once."""
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
NAMES = (".jsonl", ".jsonl.gz", ".parquet")
"""Of files that can be written."""

Watch = Callable[[int], None]
"""Told now and then how many of the file's bytes are read."""


class BadRow(ValueError):
    """Why a row cannot be used, in words that can be counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, or why it is none."""

    number: int
    """Of its line, or its place in a table, from 1."""
    value: dict[str, Any]
    problem: str | None = None


def read_rows(path: Path, *, tabs: bool = False, watch: Watch = lambda _: None) -> Iterator[Row]:
    """The rows of a file, blank lines left out. `tabs`: a table with a line of names, as spreadsheets write it.

    Raises `DataError` where it cannot be read as a whole: no such file, damaged, a row without end.
    """
    try:
        with path.open("rb") as raw:
            begin = raw.read(4)
            raw.seek(0)
            if begin == PARQUET:
                yield from _parquet_rows(path, watch)
                return
            stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if begin.startswith(GZIP) else raw  # type: ignore[assignment]
            numbered = _lines(path, stream, lambda: watch(raw.tell()))
            yield from _table(path, numbered) if tabs else map(_json_row, numbered)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): get it again") from None
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror or error}; check its path") from None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """How many there were; the file is there whole or not at all. `DataError` where its name says no known kind."""
    if not path.name.endswith(NAMES):
        raise DataError(f"{path}: what kind of file is that to be? Its name has to end with {', '.join(NAMES)}")
    with _whole(path) as partial:
        if path.suffix == ".parquet":
            return _write_parquet(partial, rows)
        count = 0
        with gzip.open(partial, "wb") if path.suffix == ".gz" else partial.open("wb") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                count += 1
        return count


def _lines(path: Path, stream: IO[bytes], watch: Callable[[], None]) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"{path}:{number}: a row above {MAX_ROW_BYTES:,} bytes: is this a JSON Lines file?")
        if number % 100 == 1:
            watch()
        if line.strip():
            yield number, line


def _json_row(numbered: tuple[int, bytes]) -> Row:
    number, line = numbered
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return Row(number, {}, "not UTF-8 text")
    except (ValueError, RecursionError):
        return Row(number, {}, "not JSON")
    return Row(number, row) if isinstance(row, dict) else Row(number, {}, "not a JSON object")


def _table(path: Path, numbered: Iterator[tuple[int, bytes]]) -> Iterator[Row]:
    """Without quotes: a tab ends a cell, whatever is in it."""
    names: list[str] | None = None
    for number, line in numbered:
        try:
            (cells,) = csv.reader(io.StringIO(line.decode()), delimiter="\t", quoting=csv.QUOTE_NONE)
        except (UnicodeDecodeError, ValueError):
            yield Row(number, {}, "not UTF-8 text in cells")
            continue
        if names is None:
            names = cells
        elif len(cells) == len(names):
            yield Row(number, dict(zip(names, cells, strict=True)))
        else:
            yield Row(number, {}, f"{len(cells)} cells where the first line names {len(names)}")
    if names is None:
        raise DataError(f"{path} is empty")


def _parquet_rows(path: Path, watch: Watch) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            number, whole = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
                watch(path.stat().st_size * number // whole)
    except (pyarrow.ArrowException, OSError) as error:  # it is there: it has been opened before
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is a damaged Parquet file ({reason}): get it again") from None


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """All rows have the columns, and the kinds of values, of the first thousand."""
    import pyarrow
    from pyarrow import parquet

    count, pending = 0, list[dict[str, Any]]()
    writer = None
    try:
        for row in rows:
            pending.append(row)
            count += 1
            if len(pending) == PARQUET_ROWS:
                writer = _add_rows(path, writer, pending)
        if pending or writer is None:
            writer = _add_rows(path, writer, pending)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"these rows do not fit into one table ({reason}): write .jsonl instead") from None
    finally:
        if isinstance(writer, parquet.ParquetWriter):
            writer.close()
    return count


def _add_rows(path: Path, writer: Any, pending: list[dict[str, Any]]) -> Any:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(pending, schema=None if writer is None else writer.schema)
    writer = writer or parquet.ParquetWriter(path, table.schema, write_page_checksum=True)
    writer.write_table(table)
    pending.clear()
    return writer


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside it to write to, which takes its place once that is done."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
