"""How far an ensemble of reward models disagrees about answers: what is most worth a person's time."""

import torch
from torch import Tensor


def preference_disagreement(scores: Tensor) -> float:
    """The variance across models of P(i preferred to j) = sigmoid(score_i - score_j), averaged over pairs of answers.

    Queries are chosen where that is large by Christiano et al. 2017, "Deep Reinforcement Learning from Human
    Preferences", section 2.2.4. A constant that a model adds to its scores counts for
    nothing.

    scores: (models, answers), two of each at least. Between 0, all say the same, and 0.25, half of them are sure of one
    order and half of the other.
    """
    models, answers = scores.shape
    assert models >= 2
    assert answers >= 2
    i, j = torch.triu_indices(answers, answers, offset=1)
    preferred = torch.sigmoid(scores[:, i] - scores[:, j])  # (models, pairs)
    return float(preferred.var(0, correction=0).mean())
