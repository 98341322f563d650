"""How published datasets of human feedback write it: HH-RLHF, UltraFeedback, HelpSteer2, SHP, OpenAI's comparisons of
summaries, votes of the LMArena, and exports of Argilla.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_ray.feedback.formats.judged import (
    ROLES,
    Judged,
    Said,
    Unsayable,
    as_turns,
    choice,
    name_of,
    number_of,
    pairs_of,
    prompt_of,
    text_of,
    turns_of,
    usable,
)
from rlhf_ray.feedback.formats.rows import BadRow
from rlhf_ray.feedback.schema import MAX_COMMENT, Comment, Feedback, Ranking, Rating, competition_ranks, is_unicode
from rlhf_ray.types import Message, Role

HH_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
ULTRAFEEDBACK_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
HELPSTEER_ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_HELPSTEER_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")
ARENA_VOTES = {"model_a": (1, 2), "model_b": (2, 1), "tie": (1, 1), "tie (bothbad)": (1, 1), "both_bad": (1, 1)}
ALL_BAD = ("tie (bothbad)", "both_bad")
ARGILLA_PROMPTS = ("prompt", "instruction", "question", "input", "messages", "context")
ARGILLA_ANSWERS = re.compile(r"(response|answer|completion|output|generation|reply)", re.IGNORECASE)


def read_hh(row: Mapping[str, Any]) -> list[Judged]:
    """`{chosen, rejected}`, each a whole dialogue: `\\n\\nHuman: ... \\n\\nAssistant: ...`."""
    chosen, rejected = (_hh_dialogue(row, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("the two dialogues differ before the last answer")
    messages = prompt_of(chosen[:-1])
    answers = (
        Said(usable(turns[-1].content, f"{name} answer"))
        for turns, name in ((chosen, "chosen"), (rejected, "rejected"))
    )
    return [choice(messages, *answers)]


def write_hh(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """The same back; turns are trimmed, and none may say what marks the next one."""
    del conversational  # it is one of its own kind
    spoken = {role: who for who, role in HH_ROLES.items()}
    if any(message.role not in spoken for message in feedback.messages):
        raise Unsayable("a turn of the system's")
    texts = [message.content for message in feedback.messages] + [answer.text for answer in feedback.answers]
    if any(_HH_TURN.search(text) for text in texts):
        raise Unsayable("a turn that says what marks a turn")
    before = "".join(f"\n\n{spoken[message.role]}: {message.content.strip()}" for message in feedback.messages)
    return [
        {"chosen": f"{before}\n\nAssistant: {good.strip()}", "rejected": f"{before}\n\nAssistant: {bad.strip()}"}
        for good, bad in pairs_of(feedback)
    ]


def read_ultrafeedback(row: Mapping[str, Any]) -> list[Judged]:
    """`{instruction, completions: [{model, response, annotations, overall_score, critique}]}`: for each answer a rating
    by aspect from 1 to 5, an overall one from 1 to 10, and what was said of it.
    """
    messages = prompt_of((Message("user", text_of(row, "instruction")),))
    found: list[Judged] = []
    for completion in _dicts(row, "completions"):
        about = (Said(text_of(completion, "response"), name_of(completion, "model")),)
        annotations = completion.get("annotations") or {}
        for aspect in ULTRAFEEDBACK_ASPECTS:
            mark = annotations.get(aspect) if isinstance(annotations, dict) else None
            value = number_of(mark, "Rating") if isinstance(mark, dict) else None
            if value is not None:
                found.append(Judged(messages, about, _points(value, 1, 5, aspect)))
        overall = number_of(completion, "overall_score")
        if overall is not None:
            found.append(Judged(messages, about, _points(overall, 1, 10)))
        found += _comments(messages, about, completion, "critique")
    if not found:
        raise BadRow("no completion that was judged")
    return found


def read_helpsteer(row: Mapping[str, Any]) -> list[Judged]:
    """HelpSteer2's ratings, `{prompt, response, helpfulness, ...}` from 0 to 4, or its preferences, `{prompt,
    response_1, response_2, preference_strength}` from -3 (the first is much better) to 3, with what was said of it.
    """
    messages = prompt_of(_helpsteer_turns(text_of(row, "prompt")))
    if "response_1" in row:
        return list(_helpsteer_preference(row, messages))
    about = (Said(text_of(row, "response")),)
    marks = {aspect: number_of(row, aspect) for aspect in HELPSTEER_ASPECTS}
    found = [
        Judged(messages, about, _points(value, 0, 4, aspect)) for aspect, value in marks.items() if value is not None
    ]
    if not found:
        raise BadRow("no aspect that was rated")
    return found


def read_shp(row: Mapping[str, Any]) -> list[Judged]:
    """Stanford's human preferences: two comments on a post, the one with more votes is the better one."""
    label = row.get("labels")
    if label not in (0, 1):
        raise BadRow("no 0 or 1 under 'labels'")
    messages = prompt_of((Message("user", text_of(row, "history")),))
    first, second = (Said(text_of(row, f"human_ref_{side}"), "human") for side in "AB")
    chosen, rejected = (first, second) if label == 1 else (second, first)
    post = name_of(row, "post_id")
    return [choice(messages, chosen, rejected, strength=number_of(row, "score_ratio"), group=post)]


def read_summaries(row: Mapping[str, Any]) -> list[Judged]:
    """OpenAI's comparisons: `{info: {post or article}, summaries: [{text, policy}], choice, worker}`."""
    info = row.get("info")
    if not isinstance(info, dict):
        raise BadRow("no object under 'info'")
    messages = prompt_of((Message("user", text_of(info, "post" if info.get("post") is not None else "article")),))
    summaries = [Said(text_of(summary, "text"), name_of(summary, "policy")) for summary in _dicts(row, "summaries")]
    picked = row.get("choice")
    if len(summaries) != 2 or picked not in (0, 1):
        raise BadRow("not a choice between two summaries")
    who = name_of(row, "worker")
    return [choice(messages, summaries[picked], summaries[1 - picked], annotator=who, group=name_of(info, "id"))]


def read_arena(row: Mapping[str, Any]) -> list[Judged]:
    """`{conversation_a, conversation_b, winner}`; whoever answered is on the left, as it was shown."""
    winner = row.get("winner")
    if not isinstance(winner, str) or winner not in ARENA_VOTES:
        raise BadRow("no known vote under 'winner'")
    sides = [turns_of(row.get(f"conversation_{side}"), f"conversation_{side}") for side in "ab"]
    if not all(sides) or sides[0][:-1] != sides[1][:-1]:
        raise BadRow("the two conversations differ before the last answer")
    answers = []
    for side, turns in zip("ab", sides, strict=True):
        if turns[-1].role != "assistant":
            raise BadRow("a conversation does not end with the assistant's turn")
        answers.append(Said(usable(turns[-1].content, f"answer {side}"), name_of(row, f"model_{side}")))
    vote = Ranking(ranks=ARENA_VOTES[winner], all_bad=True if winner in ALL_BAD else None)
    who = name_of(row, "judge") or name_of(row, "evaluation_session_id")
    return [Judged(prompt_of(sides[0][:-1]), tuple(answers), vote, annotator=who, display_order=(0, 1))]


def write_arena(feedback: Feedback, *, conversational: bool) -> list[dict[str, Any]]:
    """A vote between two, in the order of the answers."""
    del conversational  # it always is
    if feedback.ranking is None or len(feedback.answers) != 2:
        raise Unsayable("not a comparison of two answers")
    ranks = feedback.ranking.ranks
    tie = "tie (bothbad)" if feedback.ranking.all_bad else "tie"
    prompt = as_turns(feedback.messages)
    row: dict[str, Any] = {"winner": tie if ranks[0] == ranks[1] else "model_a" if ranks[0] < ranks[1] else "model_b"}
    for side, answer in zip("ab", feedback.answers, strict=True):
        row[f"model_{side}"] = answer.sampler
        row[f"conversation_{side}"] = [*prompt, {"role": "assistant", "content": answer.text}]
    return [row | {"judge": feedback.annotator}]


def read_argilla(row: Mapping[str, Any]) -> list[Judged]:
    """A record: `{fields, responses}`, as both of its generations export it. Fields are a prompt and answers, by their
    names; numbers are ratings, lists of ranks rankings, the name of a field a choice, other texts comments.
    """
    fields = row.get("fields")
    if not isinstance(fields, dict):
        raise BadRow("no object under 'fields'")
    key = next((name for name in ARGILLA_PROMPTS if fields.get(name)), None)
    if key is None:
        raise BadRow(f"no field that is a prompt ({', '.join(ARGILLA_PROMPTS)})")
    prompt = fields[key]
    messages = prompt_of(
        turns_of(prompt, key) if isinstance(prompt, list) else (Message("user", text_of(fields, key)),)
    )
    answers = {name: Said(text_of(fields, name)) for name in fields if name != key and ARGILLA_ANSWERS.search(name)}
    if not answers:
        raise BadRow("no field that is an answer")
    found = []
    for question, value, who in _argilla_values(row.get("responses")):
        judged = _argilla_judged(messages, answers, question, value, who)
        if judged is not None:
            found.append(judged)
    if not found:
        raise BadRow("no response that was submitted")
    return found


def _argilla_values(responses: Any) -> Iterator[tuple[str, Any, str | None]]:
    """Question, value and user of what was submitted: by user in the first generation, by question in the second."""
    if isinstance(responses, list):
        for response in responses:
            if isinstance(response, dict) and response.get("status", "submitted") == "submitted":
                values = response.get("values")
                for question, given in (values if isinstance(values, dict) else {}).items():
                    value = given.get("value") if isinstance(given, dict) else given
                    yield str(question), value, name_of(response, "user_id")
    elif isinstance(responses, dict):
        for question, given in responses.items():
            for response in given if isinstance(given, list) else []:
                if isinstance(response, dict) and response.get("status", "submitted") == "submitted":
                    yield str(question), response.get("value"), name_of(response, "user_id")


def _argilla_judged(
    messages: tuple[Message, ...], answers: dict[str, Said], question: str, value: Any, who: str | None
) -> Judged | None:
    """None where it says nothing about the answers."""
    shown = tuple(answers.values())
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        named = [said for name, said in answers.items() if name in question]
        about = shown if len(shown) == 1 else tuple(named)
        if len(about) != 1:
            return None  # of several answers, and it does not say of which
        return Judged(messages, about, Rating(value=float(value), scale="points", aspect=question[:200]), annotator=who)
    if isinstance(value, str) and value in answers and len(answers) > 1:
        scores = [float(name == value) for name in answers]
        return Judged(messages, shown, Ranking(ranks=competition_ranks(scores)), annotator=who)
    if isinstance(value, str) and value.strip():
        return Judged(messages, shown, Comment(text=value[:MAX_COMMENT]), annotator=who)
    if isinstance(value, list) and len(answers) > 1:
        ranks = {item.get("value"): number_of(item, "rank") for item in value if isinstance(item, dict)}
        if set(ranks) == set(answers) and None not in ranks.values():
            scores = [-(ranks[name] or 0.0) for name in answers]
            return Judged(messages, shown, Ranking(ranks=competition_ranks(scores)), annotator=who)
    return None


def _helpsteer_preference(row: Mapping[str, Any], messages: tuple[Message, ...]) -> Iterator[Judged]:
    strength = number_of(row, "preference_strength")
    if strength is None or not -3 <= strength <= 3:
        raise BadRow("no number from -3 to 3 under 'preference_strength'")
    shown = tuple(Said(text_of(row, f"response_{side}")) for side in "12")
    ranks = competition_ranks([-strength, strength])
    yield Judged(messages, shown, Ranking(ranks=ranks, strength=abs(strength)), display_order=(0, 1))
    for key in ("preference_statement", "preference_elaboration"):
        yield from _comments(messages, shown, row, key)


def _helpsteer_turns(prompt: str) -> tuple[Message, ...]:
    """The user's turn, or a dialogue whose later turns are marked."""
    first, *rest = _HELPSTEER_TURN.split(prompt)
    turns = [Message("user", first.strip())]
    turns += [Message(ROLES[who.lower()], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True)]
    return tuple(turns)


def _hh_dialogue(row: Mapping[str, Any], key: str) -> list[Message]:
    text = row.get(key)
    if not isinstance(text, str):
        raise BadRow(f"no text under '{key}'")
    if not is_unicode(text):
        raise BadRow(f"'{key}' is not valid Unicode")
    before, *rest = _HH_TURN.split(text)
    if before.strip() or not rest:
        raise BadRow("a dialogue does not begin with a Human or Assistant turn")
    turns = [Message(HH_ROLES[who], said.strip()) for who, said in zip(rest[::2], rest[1::2], strict=True)]
    if turns[-1].role != "assistant":
        raise BadRow("a dialogue does not end with an Assistant turn")
    return turns


def _points(value: float, low: float, high: float, aspect: str = "overall") -> Rating:
    if not low <= value <= high:
        raise BadRow(f"a rating outside {low:g} to {high:g}")
    return Rating(value=value, scale="points", aspect=aspect, low=float(low), high=float(high))


def _comments(messages: tuple[Message, ...], about: tuple[Said, ...], row: Mapping[str, Any], key: str) -> list[Judged]:
    said = row.get(key)
    if not isinstance(said, str) or not said.strip():
        return []
    return [Judged(messages, about, Comment(text=usable(said, f"'{key}'")[:MAX_COMMENT]))]


def _dicts(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    values = row.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise BadRow(f"no list of objects under '{key}'")
    return values
