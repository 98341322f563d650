"""Human choices out of files: HH-RLHF's dialogues, or plain rows of prompt, chosen and rejected.

One JSON object a line, plain or gzip (recognised by content, not by name). A row that cannot be used stops the
import with its line number, or is skipped and counted by reason: never silently.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import MAX_TEXT, Answer, Feedback, Ranking, canonical_json, is_unicode
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.types import Message, Prompt, Role

Format = Literal["hh", "pairs"]
OnBadRow = Literal["error", "skip"]
MAX_ROW_BYTES = 8_000_000
_ROLES: dict[str, Role] = {
    "Human": "user",
    "Assistant": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Pair:
    """One human choice between two answers to the same prompt."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PairsFile:
    """What a file held: the usable pairs, and how many rows were skipped for which reason."""

    pairs: list[Pair]
    skipped: Counter[str]

    def describe(self) -> str:
        """One line for a log: `2303 pairs; 9 rows skipped (5 ..., 4 ...)`."""
        if not self.skipped:
            return f"{len(self.pairs)} pairs; no row skipped"
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.skipped.most_common())
        return f"{len(self.pairs)} pairs; {self.skipped.total()} rows skipped ({reasons})"


class _BadRow(ValueError):
    """Why a row cannot be used, in words that can be counted."""


def read_pairs(path: Path, format: Format = "hh", on_bad_row: OnBadRow = "error") -> PairsFile:
    """The pairs of a file; `DataError` where it is no such file, holds none, or a bad row is not to be skipped."""
    parse = {"hh": _parse_hh, "pairs": _parse_pair}[format]
    pairs: list[Pair] = []
    skipped: Counter[str] = Counter()
    for number, line in _lines(path):
        try:
            pairs.append(parse(_parse_json(line)))
        except _BadRow as error:
            if on_bad_row == "error":
                raise DataError(
                    f"{path}:{number}: {error}: mend or remove the row, or skip and count such rows "
                    "with data.on_bad_row=skip"
                ) from None
            skipped[str(error)] += 1
    if not pairs:
        held = PairsFile(pairs, skipped).describe() if skipped else "it is empty"
        raise DataError(f"{path} holds no usable pair in format '{format}' ({held}): check data.path and data.format")
    return PairsFile(pairs, skipped)


def import_pairs(
    store: FeedbackStore, pairs: Iterable[Pair], *, annotator: str = "hh-rlhf", sampler: str = "hh-rlhf"
) -> list[str]:
    """Write each choice into the store as a ranking of two; the ids. Importing the same pairs again adds nothing."""
    seen: Counter[str] = Counter()
    rows = []
    for pair in pairs:
        key = _digest([annotator, sampler, pair.prompt.id, pair.chosen, pair.rejected])
        seen[key] += 1  # the same choice made twice is two choices
        # Ordered by hash, so that the place of an answer says nothing about which one was chosen.
        texts = sorted((pair.chosen, pair.rejected), key=_digest)
        rows.append(
            Feedback(
                id=f"import-{key}-{seen[key]}",
                messages=pair.prompt.messages,
                prompt_id=pair.prompt.id,
                group=pair.prompt.group,
                answers=tuple(Answer(text=text, sampler=sampler) for text in texts),
                ranking=Ranking(ranks=tuple(1 if text == pair.chosen else 2 for text in texts)),
                annotator=annotator,
            )
        )
    return store.add(rows)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            number = 0
            while line := stream.readline(MAX_ROW_BYTES + 1):
                number += 1
                if len(line) > MAX_ROW_BYTES:
                    raise DataError(f"{path}:{number}: a row above {MAX_ROW_BYTES:,} bytes: is this a JSON Lines file?")
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): get it again") from None
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror or error}; check data.path") from None


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _BadRow("not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise _BadRow("not JSON") from None
    if not isinstance(row, dict):
        raise _BadRow("not a JSON object")
    return row


def _parse_hh(row: dict[str, Any]) -> Pair:
    chosen, rejected = (_dialogue(_text(row, key)) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise _BadRow("the two dialogues differ before the last answer")
    return _pair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _parse_pair(row: dict[str, Any]) -> Pair:
    prompt = row.get("prompt")
    turns = _messages(prompt) if isinstance(prompt, list) else [Message("user", _text(row, "prompt").strip())]
    answers = []
    for key in ("chosen", "rejected"):
        if isinstance(row.get(key), list):
            said = _messages(row[key])
            if len(said) != 1 or said[0].role != "assistant":
                raise _BadRow(f"'{key}' is not one assistant turn")
            answers.append(said[0].content)
        else:
            answers.append(_text(row, key).strip())
    return _pair(turns, *answers)


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _BadRow(f"no text under '{key}'")
    if not is_unicode(value):
        raise _BadRow(f"'{key}' is not valid Unicode")
    return value


def _dialogue(text: str) -> list[Message]:
    """`\\n\\nHuman: ... \\n\\nAssistant: ...` as turns."""
    before, *rest = _TURN.split(text)
    if before.strip() or not rest:
        raise _BadRow("a dialogue does not begin with a Human or Assistant turn")
    turns = [Message(_ROLES[who], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True)]
    if turns[-1].role != "assistant":
        raise _BadRow("a dialogue does not end with an Assistant turn")
    return turns


def _messages(turns: list[Any]) -> list[Message]:
    messages = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ("system", "user", "assistant"):
            raise _BadRow("a turn without a known role")
        messages.append(Message(_ROLES[role], _text(turn, "content").strip()))
    return messages


def _pair(turns: list[Message], chosen: str, rejected: str) -> Pair:
    if not turns or turns[-1].role != "user":
        raise _BadRow("the prompt does not end with the user's turn")
    if any(not turn.content for turn in turns):
        raise _BadRow("empty turn in the prompt")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise _BadRow(f"empty {name} answer")
        if len(answer) > MAX_TEXT:
            raise _BadRow(f"{name} answer above {MAX_TEXT:,} characters")
    if chosen == rejected:
        raise _BadRow("the two answers are the same")
    merged = _merge(turns)
    first = next(turn.content for turn in merged if turn.role == "user")
    whole = _digest([[turn.role, turn.content] for turn in merged])
    return Pair(Prompt(whole, tuple(merged), group=_digest(first)), chosen, rejected)


def _merge(turns: list[Message]) -> list[Message]:
    """Turns of one speaker in a row become one: chat templates expect speakers to alternate."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            turn = Message(turn.role, f"{merged.pop().content}\n\n{turn.content}")
        merged.append(turn)
    return merged


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
