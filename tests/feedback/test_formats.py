import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import DataError
from rlhf_ray.feedback.formats import MAX_ROW_BYTES, Pair, import_pairs, read_pairs
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.types import Message, Prompt

START = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Help me"


def hh(
    chosen: str = " Gladly.", rejected: str = " No.", *, start: str = START, other: str | None = None
) -> dict[str, Any]:
    after = "\n\nAssistant:"
    return {"chosen": start + after + chosen, "rejected": (other or start) + after + rejected}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "pairs.jsonl"


def test_a_dialogue_is_split_into_turns_and_two_answers(data: Path) -> None:
    (pair,) = read_pairs(write(data, hh()), "hh", "error").pairs
    assert [(turn.role, turn.content) for turn in pair.prompt.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Help me"),
    ]
    assert (pair.chosen, pair.rejected) == ("Gladly.", "No.")


def test_dialogues_of_one_first_turn_are_one_group_and_one_dialogue_one_prompt(data: Path) -> None:
    rows = [hh(), hh(" Sure."), hh(start=START + " now"), hh(start="\n\nHuman: Bye")]
    prompts = [pair.prompt for pair in read_pairs(write(data, *rows)).pairs]
    assert prompts[0].group == prompts[1].group == prompts[2].group != prompts[3].group
    assert prompts[0].id == prompts[1].id
    assert len({prompt.id for prompt in prompts}) == 3


def test_a_speaker_who_goes_on_has_one_turn_and_quoted_names_are_text(data: Path) -> None:
    start = "\n\nHuman: A\n\nAssistant: B  Human: no turn\n\nAssistant: C\n\nHuman: D"
    (pair,) = read_pairs(write(data, hh(start=start))).pairs
    assert [turn.content for turn in pair.prompt.messages] == ["A", "B  Human: no turn\n\nC", "D"]


BAD_HH = [
    (hh(chosen=" "), "empty chosen answer"),
    (hh(rejected=""), "empty rejected answer"),
    (hh(other="\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: Help me"), "the two dialogues differ before the last answer"),
    (hh(" Same.", "Same. "), "the two answers are the same"),
    (hh(start="\n\nHuman: Hi\n\nAssistant: \n\nHuman: Well?"), "empty turn in the prompt"),
    (hh(start="\n\nHuman: Hi\n\nAssistant: A"), "the prompt does not end with the user's turn"),
    (hh(start=""), "the prompt does not end with the user's turn"),
    (hh(start="Hello. \n\nHuman: Hi"), "a dialogue does not begin with a Human or Assistant turn"),
    ({"chosen": START, "rejected": START}, "a dialogue does not end with an Assistant turn"),
    ({"chosen": hh()["chosen"]}, "no text under 'rejected'"),
    ({"chosen": 3, "rejected": 4}, "no text under 'chosen'"),
    (hh(chosen=" \ud800"), "'chosen' is not valid Unicode"),
    (b'{"chosen": ', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "not a JSON object"),
    (b'{"chosen": "\xff"}', "not UTF-8 text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_HH)
def test_a_bad_row_stops_the_import_with_its_line_and_the_way_out(data: Path, row: Any, reason: str) -> None:
    with pytest.raises(DataError) as error:
        read_pairs(write(data, hh(), b"", row), "hh", "error")
    assert str(error.value).startswith(f"{data}:3: {reason}: ")
    assert "data.on_bad_row=skip" in str(error.value)


def test_skipped_rows_are_counted_by_reason_and_told(data: Path) -> None:
    file = read_pairs(write(data, *(row for row, _ in BAD_HH), hh()), "hh", "skip")
    assert file.skipped == Counter(reason for _, reason in BAD_HH)
    assert len(file.pairs) == 1
    assert file.describe().startswith(f"1 pairs; {len(BAD_HH)} rows skipped (2 ")


def test_gzip_is_recognised_whatever_the_file_is_called(data: Path) -> None:
    plain = read_pairs(write(data, hh())).pairs
    data.write_bytes(gzip.compress(data.read_bytes()))
    assert read_pairs(data).pairs == plain


@pytest.mark.parametrize("prompt", ["Help me", [{"role": "user", "content": "Help me"}]])
@pytest.mark.parametrize("chosen", ["Gladly.", [{"role": "assistant", "content": "Gladly."}]])
def test_plain_pairs_are_texts_or_turns(data: Path, prompt: Any, chosen: Any) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": "No.", "score": 0.3}
    (pair,) = read_pairs(write(data, row), "pairs").pairs
    assert pair.prompt.messages == (Message("user", "Help me"),)
    assert (pair.chosen, pair.rejected) == ("Gladly.", "No.")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": None}, "no text under 'prompt'"),
        ({"prompt": " "}, "empty turn in the prompt"),
        ({"prompt": []}, "the prompt does not end with the user's turn"),
        ({"prompt": [{"role": "system", "content": "Be kind"}]}, "the prompt does not end with the user's turn"),
        ({"prompt": ["Help"]}, "a turn without a known role"),
        ({"prompt": [{"role": ["user"], "content": "x"}]}, "a turn without a known role"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "'chosen' is not one assistant turn"),
        ({"chosen": "x" * 100_001}, "chosen answer above 100,000 characters"),
    ],
)
def test_a_bad_plain_pair_is_named(data: Path, changes: dict[str, Any], reason: str) -> None:
    row = {"prompt": "Help me", "chosen": "Gladly.", "rejected": "No."} | changes
    with pytest.raises(DataError) as error:
        read_pairs(write(data, row), "pairs")
    assert str(error.value).startswith(f"{data}:1: {reason}: ")


def test_a_missing_file_a_folder_and_an_empty_file_are_named(data: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read data file .*No such file.*check data\.path"):
        read_pairs(data)
    with pytest.raises(DataError, match=r"cannot read data file .*directory"):
        read_pairs(data.parent)
    data.touch()
    with pytest.raises(DataError, match="it is empty"):
        read_pairs(data)


def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(data: Path) -> None:
    with pytest.raises(DataError, match=r"holds no usable pair in format 'pairs' .*1 no text under 'prompt'"):
        read_pairs(write(data, hh()), "pairs", "skip")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_gzip_file_is_an_error_even_when_skipping(data: Path, damage: str) -> None:
    zipped = bytearray(gzip.compress(b"".join(json.dumps(hh(f" {n}")).encode() + b"\n" for n in range(500))))
    if damage == "cut":
        del zipped[len(zipped) // 2 :]
    else:
        zipped[len(zipped) // 2] ^= 0xFF
    data.write_bytes(zipped)
    with pytest.raises(DataError, match="is a damaged gzip file"):
        read_pairs(data, "hh", "skip")


def test_a_row_without_end_is_not_read_into_memory(data: Path) -> None:
    data.write_bytes(gzip.compress(b"x" * (12 * MAX_ROW_BYTES), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(DataError, match="is this a JSON Lines file"):
        read_pairs(data, "hh", "skip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_ROW_BYTES


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), zipped=st.booleans())
def test_binary_garbage_is_a_data_error_and_nothing_else(data: Path, content: bytes, zipped: bool) -> None:
    data.write_bytes(b"\x1f\x8b" + content if zipped else content)
    with pytest.raises(DataError):
        read_pairs(data, "hh", "skip")


def make_pair(chosen: str = "Gladly.", rejected: str = "No.") -> Pair:
    return Pair(Prompt("p", (Message("user", "Help me"),), "g"), chosen, rejected)


def test_a_choice_is_stored_as_a_ranking_of_two_with_its_provenance(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.db") as store:
        import_pairs(store, [make_pair()], annotator="crowd", sampler="their-model")
        (item,) = store.iter()
    assert dict(zip((answer.text for answer in item.answers), item.ranking.ranks, strict=True)) == {
        "Gladly.": 1,
        "No.": 2,
    }
    assert (item.annotator, {answer.sampler for answer in item.answers}) == ("crowd", {"their-model"})
    assert item.prompt == make_pair().prompt
    assert item.display_order is None


def test_importing_again_adds_nothing_but_a_choice_made_twice_counts_twice(tmp_path: Path) -> None:
    pairs = [make_pair(), make_pair("Yes."), make_pair()]
    with FeedbackStore(tmp_path / "f.db") as store:
        assert import_pairs(store, pairs) == import_pairs(store, pairs)
        assert store.count() == 3


def test_the_place_of_an_answer_does_not_tell_which_was_chosen(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "f.db") as store:
        import_pairs(store, [make_pair(f"good {n}", f"bad {n}") for n in range(400)])
        first = sum(item.ranking.ranks[0] == 1 for item in store.iter())
    assert 160 < first < 240


def test_people_s_choices_in_hh_rlhf_are_read_but_for_its_nine_bad_rows(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "hh-harmless-base-test.jsonl.gz"
    file = read_pairs(source, "hh", "skip")
    assert len(file.pairs) == 2_303
    assert file.skipped == {"the two dialogues differ before the last answer": 5, "empty chosen answer": 4}
    assert len({pair.prompt.group for pair in file.pairs}) == 2_169
    with FeedbackStore(tmp_path / "f.db") as store:
        import_pairs(store, file.pairs)
        assert store.freeze().rows == 2_303
    with pytest.raises(DataError, match=r"jsonl\.gz:87: empty chosen answer"):
        read_pairs(source, "hh", "error")
