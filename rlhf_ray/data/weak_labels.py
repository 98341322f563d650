"""What words are worth: a model of comment to rating, learnt where people gave both (weak supervision)."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlhf_ray.algo.regression import bayesian_ridge

TERMS = 1_000
"""Words, and two words in a row, that are told apart; a character is a word where no spaces are put between them."""
SEEN = 2
"""Times that a term has to occur to be one of them."""
ENOUGH = 20
"""Comments with a rating beside them, before anything is learnt from them."""
AT_A_TIME = 4_096
"""Comments whose counts are in memory at once: 32 MB."""
_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"  # Japanese, and Chinese in Bopomofo
)
"""Letters of scripts that put no spaces between words."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]")


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
        self._line = bayesian_ridge(self._parts(comments), y)
        self._variance = max(float(y.var(correction=0)), 1e-12)
        self.learnt_from = len(comments)

    def read(self, comments: Sequence[str]) -> tuple[list[float], list[float]]:
        """The rating that each is worth, and how sure that is: the share of ratings' variance that is accounted for.

        That share is what a judgement may weigh that has so much more noise than a rating: with variance s^2 in all,
        v of it left, 1 - v / s^2, and 0 for words that say nothing.
        """
        worth, sure = list[float](), list[float]()
        for part in self._parts(comments):
            expected, variance = self._line.predict(part)
            worth += expected.tolist()
            sure += (1 - variance / self._variance).clamp(0, 1).tolist()
        return worth, sure

    def loudest(self, n: int = 10) -> list[tuple[str, float]]:
        """The terms that move the rating most, with what each is worth."""
        terms = list(self._place)
        order = self._line.w.abs().argsort(descending=True)[:n].tolist()
        return [(terms[place], float(self._line.w[place])) for place in order]

    def _parts(self, comments: Sequence[str]) -> Iterator[Tensor]:
        """(n, terms) of counts, for `AT_A_TIME` comments after another."""
        width = max(1, len(self._place))
        for start in range(0, len(comments), AT_A_TIME):
            some = comments[start : start + AT_A_TIME]
            cells = [
                row * width + place
                for row, comment in enumerate(some)
                for term in _terms(comment)
                if (place := self._place.get(term)) is not None
            ]
            counts = torch.tensor(cells, dtype=torch.long).bincount(minlength=len(some) * width)
            yield counts.double().view(len(some), width)


def _terms(comment: str) -> Iterable[str]:
    words = _WORD.findall(comment.lower())
    yield from words
    yield from (f"{one} {two}" for one, two in pairwise(words))
