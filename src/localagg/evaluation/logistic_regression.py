"""Multinomial logistic regression by L-BFGS: the head that a read-out would end with, in seconds.

SciPy's L-BFGS-B steers, torch computes loss and gradient over chunks of rows. scikit-learn would
need all features standardized in one array and computes on the CPU alone, and the line search of
torch's own L-BFGS stalls more easily at float32's noise; the solutions are the same (the tests hold
them to scikit-learn's). Shapes: n rows, F features, C classes.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.counter_rng import SPLIT, bits

GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Strengths of the L2 penalty that are tried, strongest first."""
DEFAULT_L2 = 1e-2
"""The strength where there is nothing to choose it by."""
_FOLDS = 5
_ONE_FOLD = 2_000  # images from which one fold of the five says enough
_STEPS = 500  # of L-BFGS at most
_TRIAL, _FINAL = 1e-4, 1e-6  # largest slope that is left: while the strength is chosen, at the end
_CHUNK = 2**26  # bytes of standardized features at a time
_CONSTANT = 1e-6  # deviations below this share of the mean are float32's rounding


class Rows:
    """Standardized rows with their labels, in chunks.

    Args:
        take: features [B, F] of images ``index`` [B], in any floating dtype, on the CPU.
        index: int64 [n], the images.
        labels: int64 [n], theirs.
        device: where the chunks go.
        hold_gb: up to so many GiB of standardized features are held on the device; more are read
            and standardized again each time.
    """

    def __init__(
        self,
        take: Callable[[Tensor], Tensor],
        index: Tensor,
        labels: Tensor,
        device: torch.device,
        *,
        hold_gb: float = 2.0,
    ) -> None:
        self.take, self.index, self.labels, self.device = take, index, labels, device
        self.features = take(index[:1]).shape[1]
        size = max(1, _CHUNK // (4 * self.features))
        self.parts = torch.arange(len(index)).split(size)
        self.mean, self.deviation = self._scale()
        held = 4 * len(index) * self.features <= hold_gb * 2**30
        self.held = list(self._chunks()) if held else None

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(float32 [B, F], labels int64 [B], which rows these are, int64 [B]) a chunk."""
        return self._chunks() if self.held is None else iter(self.held)

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        mean, deviation = self.mean.to(self.device), self.deviation.to(self.device)
        for part in self.parts:
            rows = self.take(self.index[part]).to(self.device).float()
            yield (rows - mean) / deviation, self.labels[part].to(self.device), part

    def _scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each feature, float32 [F]; of a constant one the deviation is 1."""

        def total(value: Callable[[Tensor], Tensor]) -> Tensor:
            sums = (value(self.take(self.index[p]).double()).sum(dim=0) for p in self.parts)
            return torch.stack(list(sums)).sum(dim=0) / len(self)

        mean = total(lambda rows: rows)
        deviation = total(lambda rows: (rows - mean).square()).sqrt()
        deviation[deviation <= _CONSTANT * mean.abs()] = 1.0
        return mean.float(), deviation.float()


class Head(NamedTuple):
    """A linear head on the features as they are, not standardized."""

    weight: Tensor
    """float32 [C, F]."""
    bias: Tensor
    """float32 [C]."""
    l2: float
    """The strength of the penalty."""
    chosen: bool
    """Whether the strength was chosen by folds; else it is :data:`DEFAULT_L2`."""


def quick_head(rows: Rows, classes: int, *, seed: int = 0) -> Head:
    """A head whose penalty is chosen by cross-validation within ``rows`` alone.

    The rows are dealt into five folds, by class and seed. From strong to weak, a head for each
    strength of :data:`GRID` learns from four folds and is scored on the fifth: with all five in
    turn, or from 2,000 rows on with the first alone. The strength of the least cross-entropy is
    that of the head which then learns from all rows; it tells more of few rows than their accuracy,
    and once it rises no weaker one is tried. Rows of a class that has no other are never scored;
    where all are so, :data:`DEFAULT_L2` is taken.

    Args:
        rows: to learn from.
        classes: C; a class without rows is learned to be absent.
        seed: of the folds.
    """
    folds = _folds(rows, seed)
    trials: list[np.ndarray | None] = [None] * len(folds)
    l2, least, start = DEFAULT_L2, math.inf, None
    for strength in GRID if folds else ():
        loss = 0.0
        for number, asked in enumerate(folds):
            trial = fit(rows, classes, strength, used=~asked, start=trials[number], slope=_TRIAL)
            trials[number] = trial
            loss += int(asked.sum()) * _loss_and_gradient(rows, asked, *_split(trial, classes))[0]
        if loss >= least:
            break
        l2, least, start = strength, loss, trials[0]
    weight, bias = _split(fit(rows, classes, l2, start=start), classes)
    weight = weight / rows.deviation.double()
    bias = bias - weight @ rows.mean.double()
    return Head(weight.float(), bias.float(), l2, bool(folds))


def fit(
    rows: Rows,
    classes: int,
    l2: float,
    *,
    used: Tensor | None = None,
    start: np.ndarray | None = None,
    slope: float = _FINAL,
) -> np.ndarray:
    """The minimum of mean cross-entropy + l2 / 2 * sum of squared weights (biases are free).

    In scikit-learn's terms C = 1 / (n * l2).

    Args:
        rows: standardized.
        classes: C.
        l2: strength of the penalty.
        used: bool [n], the rows to learn from; None: all.
        start: where to begin; None: at zero.
        slope: the largest component of the gradient that may be left.

    Returns:
        float64 [C * (F + 1)]: weights and bias of each class, on standardized features.
    """
    from scipy.optimize import minimize

    used = torch.ones(len(rows), dtype=torch.bool) if used is None else used

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = _split(theta, classes)
        loss, gradient = _loss_and_gradient(rows, used, weight, bias)
        gradient[:, :-1] += l2 * weight
        return loss + l2 / 2 * float(weight.square().sum()), gradient.flatten().numpy()

    first = np.zeros(classes * (rows.features + 1)) if start is None else start
    options = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "gtol": slope, "ftol": 1e-11}
    return minimize(objective, first, jac=True, method="L-BFGS-B", options=options).x


def _loss_and_gradient(
    rows: Rows, used: Tensor, weight: Tensor, bias: Tensor
) -> tuple[float, Tensor]:
    """Mean cross-entropy of the used rows, and its gradient, float64 [C, F + 1].

    Products are in float32.
    """
    weight_CF, bias_C = weight.float().to(rows.device), bias.float().to(rows.device)
    count, loss = int(used.sum()), 0.0
    slope = torch.zeros(len(weight), rows.features + 1, dtype=torch.float64)
    for x_BF, label_B, part in rows:
        used_B1 = used[part].float().to(rows.device).unsqueeze(1)
        log_BC = torch.addmm(bias_C, x_BF, weight_CF.T).log_softmax(dim=1)
        loss -= float((log_BC.gather(1, label_B.unsqueeze(1)) * used_B1).sum())
        error_BC = log_BC.exp_()
        error_BC.scatter_add_(1, label_B.unsqueeze(1), torch.full_like(used_B1, -1.0))
        error_BC *= used_B1
        slope[:, :-1] += (error_BC.T @ x_BF).cpu()
        slope[:, -1] += error_BC.sum(dim=0).cpu()
    return loss / count, slope / count


def _split(theta: np.ndarray, classes: int) -> tuple[Tensor, Tensor]:
    """Weights float64 [C, F] and biases [C] of a flat solution."""
    table = torch.from_numpy(theta).view(classes, -1)
    return table[:, :-1], table[:, -1]


def _folds(rows: Rows, seed: int) -> list[Tensor]:
    """The rows of each fold that is scored, bool [n]."""
    _, place, count = stratified_folds(rows.labels, rows.index, seed, "folds")
    used = 1 if len(rows) >= _ONE_FOLD else _FOLDS
    folds = [(place % _FOLDS == number) & (count > 1) for number in range(used)]
    return [fold for fold in folds if fold.any()]


def stratified_folds(
    labels: Tensor, index: Tensor, seed: int, what: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffle images within their classes; a function of (seed, what, image) alone.

    Args:
        labels: int64 [n].
        index: int64 [n], the images.
        seed: of the draws.
        what: what they are for.

    Returns:
        (order, place, count), int64 [n] each: ``order`` sorts by class, then by draw; ``place`` is
        an image's rank in its class, from 0; ``count`` is the size of its class.
    """
    drawn = bits(seed, SPLIT, zlib.crc32(what.encode()), index, count=1).squeeze(-1)
    by_draw = drawn.argsort(stable=True)
    order = by_draw[labels[by_draw].argsort(stable=True)]
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - first[labels[order]]
    return order, place, counts[labels]
