"""The gold score of the dialogue world: what a careful reader would give an answer, between 0 and 1.

    gold = (0.45 on_topic + 0.30 complete + 0.25 polite) * no_repetition * right_length

Each term is in [0, 1] and is read off the text alone. The two factors keep an answer that says everything, or says
the right thing twice, from winning; `on_topic` and `complete` ask for words that differ from prompt to prompt, so no
one phrase wins either. Measurement only: nothing that trains may import this module's score.
"""

import re
from dataclasses import dataclass

from rlhf_ray.recipes.dialogue_phrases import (
    COLOURS,
    ITEMS,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    REMEDY_KEYS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    STEP_KEYS,
)

_THINGS = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(ITEMS)})\b")
_SHORTEST, _LONGEST, _MUCH_TOO_LONG = 16, 40, 60  # words

REMARKS = {
    "on_topic": "This is not about my problem.",
    "complete": "I still do not know what to do next.",
    "polite": "That was rude.",
    "no_repetition": "It says the same thing again and again.",
    "right_length": "Wrong length: I want a short and whole answer.",
}


@dataclass(frozen=True, slots=True)
class Aspects:
    """The five judgements behind a gold score, each in [0, 1]."""

    on_topic: float
    complete: float
    polite: float
    no_repetition: float
    right_length: float

    @property
    def gold(self) -> float:
        """The score."""
        merit = 0.45 * self.on_topic + 0.30 * self.complete + 0.25 * self.polite
        return merit * self.no_repetition * self.right_length


def gold_score(thing: str, problem: str, response: str) -> float:
    """How good `response` is for a customer who has `problem` with `thing` ("blue lamp")."""
    return judge(thing, problem, response).gold


def judge(thing: str, problem: str, response: str) -> Aspects:
    """The five aspects of an answer."""
    things = {" ".join(match) for match in _THINGS.findall(response)}
    remedies = _spoken(REMEDY_KEYS, response)
    steps = _spoken(STEP_KEYS, response)
    right_thing = things == {thing}
    right_remedy = remedies == {problem}
    right_step = steps == {problem}
    return Aspects(
        on_topic=(right_thing + right_remedy) / 2,
        complete=(bool(things) + bool(remedies) + 2 * right_step) / 4,
        polite=_polite(response),
        no_repetition=_no_repetition(response),
        right_length=_right_length(len(response.split())),
    )


def remark(thing: str, problem: str, response: str) -> str:
    """What a customer would say about an answer: its worst fault in a few words, or thanks."""
    aspects = judge(thing, problem, response)
    worst, value = min(((name, getattr(aspects, name)) for name in REMARKS), key=lambda item: item[1])
    return REMARKS[worst] if value < 1 else "Just what I needed, thank you."


def _spoken(keys: dict[str, str], response: str) -> set[str]:
    """The problems whose key words stand in `response` as whole words."""
    return {name for name, key in keys.items() if re.search(rf"\b{key}\b", response, re.IGNORECASE)}


def _polite(response: str) -> float:
    if any(rude in response for rude in (*RUDE_OPENERS, *RUDE_CLOSERS)):
        return 0.0
    opens = any(response.startswith(opener) for opener in POLITE_OPENERS)
    closes = any(response.rstrip().endswith(closer) for closer in POLITE_CLOSERS)
    return (opens + closes) / 2


def _no_repetition(response: str) -> float:
    """1 where every sentence is said once; loses half for each that is said again."""
    sentences = [sentence.strip() for sentence in re.split(r"(?<=[.?!])\s", response) if sentence.strip()]
    repeated = len(sentences) - len(set(sentences))
    return max(0.0, 1 - repeated / 2)


def _right_length(words: int) -> float:
    """1 between 16 and 40 words, falling in a line to 0 at none and at 60."""
    if words < _SHORTEST:
        return words / _SHORTEST
    return min(1.0, max(0.0, (_MUCH_TOO_LONG - words) / (_MUCH_TOO_LONG - _LONGEST)))
