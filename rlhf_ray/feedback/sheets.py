"""Sheets for people to judge: two answers to each prompt, in an order that says nothing, in a file for a spreadsheet.

Who gave which answer stays in a key beside the sheet. A filled-in sheet is read back with its key as rankings.
"""

import csv
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Feedback, parse_feedback
from rlhf_ray.types import Prompt

COLUMNS = ("row", "dialogue", "answer 1", "answer 2", "better")
TIE = "tie"
RANKS = {"1": (1, 2), "2": (2, 1), TIE: (1, 1)}
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that a spreadsheet would run."""


def key_of(sheet: Path) -> Path:
    """Where the key of a sheet lies."""
    return sheet.with_name(f"{sheet.name}.key.json")


def write_sheet(
    sheet: Path, prompts: Sequence[Prompt], answers: Sequence[tuple[str, str]], *, samplers: tuple[str, str], seed: int
) -> int:
    """Writes sheet and key; how many rows. Prompts that both answer alike, or not at all, are left out.

    answers: one a sampler, for each prompt.
    """
    rows: list[dict[str, Any]] = []
    for prompt, texts in zip(prompts, answers, strict=True):
        if texts[0] == texts[1] or not all(text.strip() for text in texts):
            continue
        shown = [{"text": text, "sampler": sampler} for text, sampler in zip(texts, samplers, strict=True)]
        random.Random(f"{seed}/{prompt.id}").shuffle(shown)
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        rows.append({"messages": messages, "prompt_id": prompt.id, "group": prompt.group, "answers": shown})
    with sheet.open("w", encoding="utf-8-sig", newline="") as file:  # with the mark by which Excel knows UTF-8
        out = csv.writer(file)
        out.writerow(COLUMNS)
        for number, row in enumerate(rows, 1):
            dialogue = "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])
            out.writerow([number, dialogue, *(_harmless(answer["text"]) for answer in row["answers"]), ""])
    key_of(sheet).write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return len(rows)


def read_sheet(sheet: Path, *, annotator: str) -> list[Feedback]:
    """The rankings that one annotator filled in; rows without a judgement are left out.

    Raises `DataError` with the row at fault, or where the key is missing. Reading a sheet twice gives the same ids.
    """
    try:
        key = json.loads(key_of(sheet).read_text(encoding="utf-8"))
        with sheet.open(encoding="utf-8-sig", newline="") as file:
            filled = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; a sheet is read with its key") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"{sheet} or its key is damaged ({error}): write it again") from None
    found = []
    for line, cells in enumerate(filled, 2):
        where = f"{sheet}:{line}"
        said = (cells.get("better") or "").strip().lower()
        if not said:
            continue
        number = (cells.get("row") or "").strip()
        if not number.isdecimal() or not 1 <= int(number) <= len(key):
            raise DataError(f"{where}: row '{number}' is not in the key; leave the first column as it was")
        if said not in RANKS:
            raise DataError(f"{where}: better is '{said[:20]}'; write 1, 2 or {TIE}, or leave it empty")
        row = key[int(number) - 1]
        identity = hashlib.sha256(json.dumps([annotator, row], sort_keys=True).encode()).hexdigest()[:16]
        ranking = {"ranks": RANKS[said]}
        told = {"id": f"sheet-{identity}", "annotator": annotator, "ranking": ranking, "display_order": (0, 1)}
        found.append(parse_feedback({**row, **told}))
    if not found:
        raise DataError(f"{sheet} holds no judgement: write 1, 2 or {TIE} under 'better'")
    return found


def _harmless(text: str) -> str:
    """A cell that a spreadsheet shows and does not run."""
    return f"'{text}" if text.startswith(FORMULA) else text
