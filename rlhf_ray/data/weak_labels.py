"""What words are worth: a model of comment to rating, learnt where people gave both (weak supervision)."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlhf_ray.algo.regression import bayesian_ridge

TERMS = 1_000
"""Words, and two words in a row, that are told apart."""
SEEN = 2
"""Times that a term has to occur to be one of them."""
ENOUGH = 20
"""Comments with a rating beside them, before anything is learnt from them."""
_WORD = re.compile(r"[^\W_]+|[^\w\s]", re.UNICODE)


class CommentModel:
    """A line through counts of words: several remarks on one answer add up, as error marks do.

    Its weights are penalised as the ratings themselves say (`bayesian_ridge`), so that it says how sure it is.
    """

    def __init__(self, comments: Sequence[str], targets: Sequence[float]) -> None:
        """comments: what was said of an answer; targets: how the same person rated it; `ENOUGH` of both."""
        assert len(comments) == len(targets) >= ENOUGH, (len(comments), len(targets))
        counts = Counter(term for comment in comments for term in set(_terms(comment)))
        common = sorted((term for term, n in counts.items() if n >= SEEN), key=lambda term: (-counts[term], term))
        self._place = {term: place for place, term in enumerate(common[:TERMS])}
        y = torch.tensor(targets, dtype=torch.float64)
        self._line = bayesian_ridge(self._features(comments), y)
        self._variance = max(float(y.var(correction=0)), 1e-12)
        self.learnt_from = len(comments)

    def read(self, comments: Sequence[str]) -> tuple[list[float], list[float]]:
        """The rating that each is worth, and how sure that is: the share of ratings' variance that is accounted for.

        That share is what a judgement may weigh that has so much more noise than a rating: with variance s^2 in all,
        v of it left, 1 - v / s^2, and 0 for words that say nothing.
        """
        expected, variance = self._line.predict(self._features(comments))
        sure = (1 - variance / self._variance).clamp(0, 1)
        return expected.tolist(), sure.tolist()

    def loudest(self, n: int = 10) -> list[tuple[str, float]]:
        """The terms that move the rating most, with what each is worth."""
        terms = list(self._place)
        order = self._line.w.abs().argsort(descending=True)[:n].tolist()
        return [(terms[place], float(self._line.w[place])) for place in order]

    def _features(self, comments: Sequence[str]) -> Tensor:
        """(N, terms) of counts."""
        x = torch.zeros(len(comments), max(1, len(self._place)), dtype=torch.float64)
        for row, comment in enumerate(comments):
            for term in _terms(comment):
                if (place := self._place.get(term)) is not None:
                    x[row, place] += 1
        return x


def _terms(comment: str) -> Iterable[str]:
    words = _WORD.findall(comment.lower())
    yield from words
    yield from (f"{one} {two}" for one, two in pairwise(words))
