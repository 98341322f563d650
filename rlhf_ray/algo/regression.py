"""Straight lines through features: in closed form, by descent, and with how sure they are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PASSES, CLOSE_ENOUGH = 300, 1e-6
"""Of evidence maximisation: at most so many, or until neither precision moves by more than this share."""


def ridge(features: Tensor, targets: Tensor, weights: Tensor, *, penalty: float) -> tuple[Tensor, Tensor]:
    """w (D) and b of the line x . w + b that minimises sum_i v_i (x_i . w + b - y_i)^2 + penalty |w|^2.

    Hoerl and Kennard 1970, weighted, and with an intercept that is not penalised: solved about the weighted means.

    features: (N, D); targets, weights: (N), the weights not all 0; all of it in float64 for what it is worth.
    """
    share = weights / weights.sum()
    middle, mean = share @ features, share @ targets
    x, y = features - middle, targets - mean
    gram = x.T @ (weights[:, None] * x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.solve(gram, x.T @ (weights * y))
    return w, mean - middle @ w


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 2000) -> Tensor:
    """The vector at which a smooth convex loss is least, by L-BFGS (Liu and Nocedal 1989) from `start`."""
    x = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=steps, history_size=50, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


@dataclass(frozen=True, slots=True)
class BayesianRidge:
    """A line whose penalty and noise the data themselves have said."""

    middle: Tensor
    """(D) the features' means, and `mean` that of the targets."""
    mean: float
    w: Tensor
    """(D) expected weights."""
    covariance: Tensor
    """(D, D) of the weights."""
    noise: float
    """Variance of a target about the line."""

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N) expected targets and (N) their variances, the noise and what is not known of the line: Bishop 3.58."""
        x = features - self.middle
        return self.mean + x @ self.w, self.noise + ((x @ self.covariance) * x).sum(1)


def bayesian_ridge(parts: Iterable[Tensor], targets: Tensor) -> BayesianRidge:
    """Ridge regression with the precisions of weights (a) and noise (1 / b) at which the targets are likeliest.

    MacKay 1992, as in Bishop 2006, section 3.5.2: with eigenvalues l of X'X / b and the expected weights w, in turns
    g = sum l / (l + a), a = g / |w|^2, and b = |y - X w|^2 / (N - g).

    parts: (n, D) each, features of targets in a row, of which only one has to be in memory; targets: (N), N at least 2;
    float64.
    """
    count = len(targets)
    assert count > 1, "one target has no variance"
    mean = targets.mean()
    y = targets - mean
    middle, gram, cross, parted = _sums(parts, y)
    assert parted == count, (parted, count)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    projected = vectors.T @ cross
    squares = float(y.square().sum())
    least = 1e-6 * squares / count + 1e-12
    noise = max(squares / count / 2, least)
    precision = 1.0
    for _ in range(PASSES):
        turned = projected / (values + precision * noise)  # the weights, along the eigenvectors
        known = float((values / (values + precision * noise)).sum())
        before = (precision, noise)
        precision = known / max(float(turned.square().sum()), 1e-12)
        left = squares + float((turned * (values * turned - 2 * projected)).sum())  # |y - X w|^2
        noise = max(left / max(count - known, 1e-6), least)
        if max(abs(new - old) / old for new, old in zip((precision, noise), before, strict=True)) < CLOSE_ENOUGH:
            break
        precision = max(precision, 1e-12)
    spread = noise / (values + precision * noise)
    w = vectors @ (projected / (values + precision * noise))
    return BayesianRidge(middle, float(mean), w, (vectors * spread) @ vectors.T, noise)


def _sums(parts: Iterable[Tensor], y: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """The features' means m (D), (X - m)'(X - m) (D, D) and (X - m)'y (D) for y of mean 0, and how many rows there are.

    Moments of parts added up as Chan, Golub and LeVeque 1979 do, which loses nothing where means are far from 0.
    """
    middle, gram, cross, count = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
    for part in parts:
        n, said = len(part), y[count : count + len(part)]
        own = part.mean(0)
        x, shift = part - own, own - middle
        gram = gram + x.T @ x + torch.outer(shift, shift) * (count * n / (count + n))
        cross = cross + x.T @ said + own * said.sum()
        middle = middle + shift * (n / (count + n))
        count += n
    return middle, gram, cross, count
