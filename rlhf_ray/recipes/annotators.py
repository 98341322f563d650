"""Simulated people: they rank, rate and comment on answers, with a bias and a noise that are known.

They see the gold score as a person sees quality: through their own eyes. What they write is all that training gets.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from rlhf_ray.config import AnnotatorConfig
from rlhf_ray.feedback.schema import Answer, Comment, Feedback, Ranking, Rating
from rlhf_ray.types import Prompt

Judge = Callable[[Prompt, str], float]
"""The true quality of an answer, in [0, 1]."""
Remark = Callable[[Prompt, str], str]
"""What a person would say about an answer, in words."""

TIE = 0.1
"""Answers whose quality differs by less are ranked equal."""
FIRST_DAY = datetime(2026, 1, 5, 9, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Annotator:
    """One simulated person."""

    name: str
    bias: float
    """Stars by which this one rates too kindly (or, below 0, too harshly)."""


def hire(config: AnnotatorConfig, *, seed: int) -> list[Annotator]:
    """`config.count` annotators, each with a bias drawn once."""
    rng = random.Random(f"annotators/{seed}")
    return [Annotator(f"annotator-{n}", rng.gauss(0, config.rating_bias)) for n in range(config.count)]


def annotate(
    shown: Sequence[tuple[Prompt, Sequence[Answer]]],
    *,
    judge: Judge,
    remark: Remark,
    config: AnnotatorConfig,
    seed: int,
    run_id: str,
) -> Iterator[Feedback]:
    """For each prompt, by one annotator: a ranking of all its answers, a rating of each, a comment on the first shown.

    Times and orders are drawn from the seed too, so that the same answers give the same feedback, ids included.
    """
    annotators = hire(config, seed=seed)
    for turn, (prompt, answers) in enumerate(shown):
        rng = random.Random(f"annotate/{seed}/{prompt.id}")
        annotator = annotators[turn % len(annotators)]
        order = rng.sample(range(len(answers)), len(answers))
        quality = [judge(prompt, answer.text) for answer in answers]
        name = f"{run_id}:{answers[0].sampler}:{prompt.id}"  # the same run may ask of a newer policy's answers
        common = {
            "messages": prompt.messages,
            "prompt_id": prompt.id,
            "group": prompt.group,
            "annotator": annotator.name,
            "created_at": FIRST_DAY + timedelta(minutes=turn),
        }
        yield Feedback(
            id=f"{name}:ranking",
            answers=tuple(answers),
            ranking=Ranking(ranks=rank(quality, order=order, flip=config.flip, rng=rng)),
            display_order=tuple(order),
            **common,
        )
        for index, answer in enumerate(answers):
            stars = 1 + 4 * quality[index] + annotator.bias + rng.gauss(0, config.rating_noise)
            value = float(min(5, max(1, round(stars))))
            yield Feedback(id=f"{name}:rating:{index}", answers=(answer,), rating=Rating(value=value), **common)
        first = answers[order[0]]
        text = remark(prompt, first.text)
        yield Feedback(id=f"{name}:comment", answers=(first,), comment=Comment(text=text), **common)


def rank(quality: Sequence[float], *, order: Sequence[int], flip: float, rng: random.Random) -> tuple[int, ...]:
    """Competition ranks, best first, found as people do: each answer is compared with those already in place.

    Every comparison comes out the wrong way round with probability `flip`. Answers of about equal quality share a rank.
    """
    line: list[list[int]] = []  # places from best to worst, each with its tied answers
    for answer in order:
        place = 0
        while place < len(line):
            other = line[place][0]
            if abs(quality[answer] - quality[other]) < TIE:
                break
            prefers = quality[answer] > quality[other]
            if prefers != (rng.random() < flip):
                break
            place += 1
        if place < len(line) and abs(quality[answer] - quality[line[place][0]]) < TIE:
            line[place].append(answer)
        else:
            line.insert(place, [answer])
    ranks = [0] * len(quality)
    position = 1
    for tied in line:
        for answer in tied:
            ranks[answer] = position
        position += len(tied)
    return tuple(ranks)


def flipped_share(feedback: Sequence[Feedback], judge: Judge) -> float:
    """The share of strict pairs in the rankings that contradict the true order: the noise that training really met."""
    wrong = total = 0
    for item in feedback:
        if item.ranking is None:
            continue
        quality = [judge(item.prompt, answer.text) for answer in item.answers]
        ranks = item.ranking.ranks
        for i in range(len(ranks)):
            for j in range(i + 1, len(ranks)):
                if ranks[i] != ranks[j] and abs(quality[i] - quality[j]) >= TIE:
                    total += 1
                    wrong += (ranks[i] < ranks[j]) != (quality[i] > quality[j])
    return wrong / total if total else 0.0
