"""How a pile of feedback is read: whose word counts for how much, what their numbers mean, what their words are worth.

All of it is learnt from the side that is trained on, and nothing of it from what is held out, nor from whose ratings
count for nothing.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf_ray.data.judgements import Judgement, Ordered, Rated, Thumbed
from rlhf_ray.data.weak_labels import ENOUGH, CommentModel
from rlhf_ray.feedback.quality import ENOUGH as SHARED
from rlhf_ray.feedback.quality import Person, quality_of
from rlhf_ray.feedback.schema import Feedback, Rating

EARLIER_RATINGS = 10.0
"""How many ratings of everybody's somebody's own line starts with; and how many choices what they call much better."""
LEAST_STD = 1e-3
"""Of somebody's ratings; who gives everything the same mark would otherwise be infinitely loud."""


class Scale(NamedTuple):
    """Ratings that may be compared: of one aspect, between the same ends."""

    scale: str
    aspect: str
    low: float | None
    high: float | None


class Line(NamedTuple):
    """What somebody gives a middling answer, and how far their marks spread."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """What an annotator's word counts for, beside 1 for somebody of whom nothing is known."""

    choices: float
    ratings: float


class Reader:
    """Turns feedback into judgements to learn from."""

    def __init__(self, train: Sequence[Feedback], *, weigh: bool = True, margin: float = 0.0) -> None:
        """train: what is learnt from. weigh: count people by how far they can be relied on. margin: log-odds by
        which a choice has to be won whose better answer is, to the annotator, as much better as usual, where they said.
        """
        self.reliability = reliabilities(train) if weigh else {}
        raters = [item for item in train if self._trust(item.annotator).ratings > 0]
        self._lines, self._everybody = _lines(raters)
        self._margin = margin
        self._usual_of, self._usual = _strengths(item for item in train if self._trust(item.annotator).choices > 0)
        self.words = self._learn_words(raters)
        self.unread: Counter[str] = Counter()
        """Comments that were worth nothing in all that was read so far, by why; those beside a rating are not meant."""

    def read(self, feedback: Iterable[Feedback], *, all_comments: bool = False) -> list[Judgement]:
        """Judgements in the order of the feedback, comments last.

        A comment counts where the same person gave the same answer no number; with `all_comments` each does.
        """
        feedback = list(feedback)
        read = [judgement for item in feedback for judgement in self._read(item)]
        return read + self._read_comments(feedback, every=all_comments)

    def _trust(self, annotator: str) -> Reliability:
        return self.reliability.get(annotator, Reliability(1.0, 1.0))

    def _read(self, item: Feedback) -> Iterator[Judgement]:
        who = self._trust(item.annotator)
        if item.ranking is not None:
            if who.choices and (ordered := self._read_ranking(item, who.choices)):
                yield ordered
            if item.ranking.all_bad and who.ratings:
                for text in dict.fromkeys(answer.text for answer in item.answers):
                    yield Thumbed(item.prompt, text, up=False, annotator=item.annotator, weight=who.ratings)
        elif item.rating is not None and who.ratings and (rated := self._read_rating(item, item.rating, who.ratings)):
            yield rated

    def _read_rating(self, item: Feedback, rating: Rating, weight: float) -> Rated | Thumbed | None:
        """None on a scale that nobody used on the side that was learnt from: what its numbers mean is not known."""
        text, who = item.answers[0].text, item.annotator
        if rating.scale == "thumb":
            return Thumbed(item.prompt, text, rating.value == 1, annotator=who, weight=weight)
        target = self._target(who, rating)
        return None if target is None else Rated(item.prompt, text, target, rating.aspect, annotator=who, weight=weight)

    def _read_ranking(self, item: Feedback, weight: float) -> Ordered | None:
        """Of answers that say the same the best place counts; None where nothing is left to compare."""
        assert item.ranking is not None
        best: dict[str, int] = {}
        for answer, rank in zip(item.answers, item.ranking.ranks, strict=True):
            best[answer.text] = min(rank, best.get(answer.text, rank))
        if len(best) < 2:
            return None
        texts = tuple(best)
        shown = item.answers[item.display_order[0]].text if item.display_order else None
        return Ordered(
            item.prompt,
            texts,
            tuple(best.values()),
            margin=self._margin_of(item.annotator, item.ranking.strength),
            first=None if shown is None else texts.index(shown),
            annotator=item.annotator,
            weight=weight,
        )

    def _margin_of(self, annotator: str, strength: float | None) -> float:
        usual = self._usual_of.get(annotator, self._usual)
        return self._margin / usual * strength if strength and usual else 0.0

    def _target(self, annotator: str, rating: Rating) -> float | None:
        scale = _scale(rating)
        line = self._lines.get((annotator, scale)) or self._everybody.get(scale)
        return None if line is None else (rating.value - line.mean) / line.std

    def _learn_words(self, raters: Sequence[Feedback]) -> CommentModel | None:
        """From answers of which one person gave both; None where those are too few."""
        words, marks = _words(raters), self._marks(raters)
        both = [key for key in words if key in marks]
        if len(both) < ENOUGH:
            return None
        return CommentModel([" \n".join(words[key]) for key in both], [marks[key] for key in both])

    def _marks(self, feedback: Iterable[Feedback]) -> dict[tuple[str, str, str], float]:
        """The mean of what each person gave each answer, over aspects; a thumb is one standard deviation."""
        marks: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        for item in feedback:
            if item.rating is not None:
                thumb = item.rating.scale == "thumb"
                target = 2 * item.rating.value - 1 if thumb else self._target(item.annotator, item.rating)
                if target is not None:
                    marks[_about(item)].append(target)
        return {key: statistics.fmean(given) for key, given in marks.items()}

    def _read_comments(self, feedback: Sequence[Feedback], *, every: bool) -> list[Judgement]:
        for item in feedback:
            if item.comment is not None and len(item.answers) > 1:
                self.unread["on several answers at once"] += 1
        words = _words(feedback)
        marked = set() if every else {_about(item) for item in feedback if item.rating is not None}
        wanted = [key for key in words if key not in marked]
        if self.words is None:
            for key in wanted:
                self.unread[f"with fewer than {ENOUGH} rated ones to learn words from"] += len(words[key])
            return []
        prompts = {item.prompt_id: item.prompt for item in feedback}
        worth, sure = self.words.read([" \n".join(words[key]) for key in wanted])
        read: list[Judgement] = []
        for key, target, certainty in zip(wanted, worth, sure, strict=True):
            prompt, text, who = key
            trust = self._trust(who).ratings
            if (weight := certainty * trust) > 0:
                read.append(Rated(prompts[prompt], text, target, kind="comments", annotator=who, weight=weight))
            else:
                why = "in words that tell nothing of ratings" if trust else "by annotators who count for nothing"
                self.unread[why] += len(words[key])
        return read


def reliabilities(feedback: Sequence[Feedback]) -> dict[str, Reliability]:
    """Of those who judged enough that others judged too; nobody else's word is changed.

    Of choices a share e of which is the wrong way round, 1 - 2e: the gradient's mean is so much smaller and its
    variance the same (Natarajan et al. 2013). Of ratings whose correlation with quality is c, c^2: the share of their
    variance that is quality's. Who is no better than chance counts for nothing. The weights have mean 1 over
    judgements, so that a pile weighs what it holds.
    """
    people = {person.name: person for person in quality_of(feedback).people}
    known = {
        name: (_of_choices(person), _of_ratings(person))
        for name, person in people.items()
        if _of_choices(person) is not None or _of_ratings(person) is not None
    }
    choices = _with_mean_one({name: weight for name, (weight, _) in known.items() if weight is not None}, people)
    ratings = _with_mean_one({name: weight for name, (_, weight) in known.items() if weight is not None}, people)
    return {
        name: Reliability(
            choices.get(name, 1.0 if ratings.get(name, 1.0) > 0 else 0.0),
            ratings.get(name, 1.0 if choices.get(name, 1.0) > 0 else 0.0),
        )
        for name in known
    }


def _of_choices(person: Person) -> float | None:
    if person.edge is None or person.choices < SHARED:
        return None
    return max(0.0, person.edge)


def _of_ratings(person: Person) -> float | None:
    if person.correlation is None or person.ratings < SHARED:
        return None
    return max(0.0, person.correlation) ** 2


def _with_mean_one(weights: dict[str, float], people: dict[str, Person]) -> dict[str, float]:
    total = sum(people[name].judgements for name, weight in weights.items() if weight > 0)
    weighed = sum(weight * people[name].judgements for name, weight in weights.items())
    return {name: weight * total / weighed if weighed else 0.0 for name, weight in weights.items()}


def _lines(feedback: Iterable[Feedback]) -> tuple[dict[tuple[str, Scale], Line], dict[Scale, Line]]:
    """Everybody's line on each scale, and each annotator's, drawn to it as if by `EARLIER_RATINGS` ratings."""
    given: defaultdict[Scale, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for item in feedback:
        if item.rating is not None and item.rating.scale != "thumb":
            given[_scale(item.rating)][item.annotator].append(item.rating.value)
    lines: dict[tuple[str, Scale], Line] = {}
    everybody: dict[Scale, Line] = {}
    for scale, by_annotator in given.items():
        values = [value for mine in by_annotator.values() for value in mine]
        mean = statistics.fmean(values)
        everybody[scale] = Line(mean, max(statistics.pstdev(values), LEAST_STD))
        own = {
            who: (sum(mine) + EARLIER_RATINGS * mean) / (len(mine) + EARLIER_RATINGS)
            for who, mine in by_annotator.items()
        }
        squares = {who: math.fsum((value - own[who]) ** 2 for value in mine) for who, mine in by_annotator.items()}
        variance = math.fsum(squares.values()) / len(
            values
        )  # about people's own means: what differs between them is bias
        for who, mine in by_annotator.items():
            spread = (squares[who] + EARLIER_RATINGS * variance) / (len(mine) + EARLIER_RATINGS)
            lines[who, scale] = Line(own[who], max(spread**0.5, LEAST_STD))
    return lines, everybody


def _strengths(feedback: Iterable[Feedback]) -> tuple[dict[str, float], float | None]:
    """The mean of how much better each annotator finds the better of two, and everybody's, None where nobody said it.

    On whatever scale: each one's mean is drawn to everybody's as if by `EARLIER_RATINGS` choices, and by ratio.
    """
    given: defaultdict[str, list[float]] = defaultdict(list)
    for item in feedback:
        if item.ranking and item.ranking.strength:
            given[item.annotator].append(item.ranking.strength)
    if not given:
        return {}, None
    mean = statistics.fmean(strength for mine in given.values() for strength in mine)
    return {
        who: mean * (statistics.fmean(mine) / mean) ** (len(mine) / (len(mine) + EARLIER_RATINGS))
        for who, mine in given.items()
    }, mean


def _scale(rating: Rating) -> Scale:
    return Scale(rating.scale, rating.aspect, rating.low, rating.high)


def of_aspects(feedback: Iterable[Feedback], aspects: Container[str]) -> list[Feedback]:
    """All of it, but of stars and points those of these aspects alone."""
    return [
        item
        for item in feedback
        if item.rating is None or item.rating.scale == "thumb" or item.rating.aspect in aspects
    ]


def _about(item: Feedback) -> tuple[str, str, str]:
    """What a rating or comment on one answer is about, and whose it is."""
    return item.prompt_id, item.answers[0].text, item.annotator


def _words(feedback: Iterable[Feedback]) -> dict[tuple[str, str, str], list[str]]:
    """All that each person wrote of each answer; of a comment on several answers nobody knows which it means."""
    words: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for item in feedback:
        if item.comment is not None and len(item.answers) == 1:
            words[_about(item)].append(item.comment.text)
    return dict(words)
