"""Baselines for pen strokes. Sequences are (T, 3), normalised."""

import math
from collections.abc import Callable

import numpy as np


def one_mixture(train: list[np.ndarray], components: int) -> Callable[[np.ndarray], float]:
    """Fit a baseline without context: one mixture for all offsets, one probability that the pen is lifted.

    Args:
        train: Training sequences.
        components: Number of components of the mixture.

    Returns:
        A function that computes the loss in nats of a sequence's points after the first.
    """
    from sklearn.mixture import GaussianMixture

    points = np.concatenate([sequence[1:] for sequence in train]).astype(np.float64)
    some = points[:: max(1, len(points) // 20_000), :2]
    mixture = GaussianMixture(min(components, len(some)), reg_covar=1e-4, max_iter=30, random_state=0).fit(some)
    pen = _pen(points)
    return lambda sequence: pen(sequence) - mixture.score_samples(sequence[1:, :2].astype(np.float64)).sum()


def last_offset(train: list[np.ndarray]) -> Callable[[np.ndarray], float]:
    """Fit a baseline that expects the last offset again: a Gaussian around it.

    Returns:
        A function that computes the loss in nats of a sequence's points after the first.
    """
    changes = np.concatenate([np.diff(sequence[:, :2].astype(np.float64), axis=0) for sequence in train])
    covariance = changes.T @ changes / len(changes)
    inverse, constant = np.linalg.inv(covariance), math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] / 2
    pen = _pen(np.concatenate([sequence[1:] for sequence in train]))

    def nats(sequence: np.ndarray) -> float:
        d = np.diff(sequence[:, :2].astype(np.float64), axis=0)
        return pen(sequence) + constant * len(d) + (d @ inverse * d).sum() / 2

    return nats


def _pen(points: np.ndarray) -> Callable[[np.ndarray], float]:
    """Fit the probability that the pen is lifted. Returns a function like those above."""
    lifted = (points[:, 2].sum() + 1) / (len(points) + 2)
    return lambda sequence: -np.where(sequence[1:, 2] > 0.5, math.log(lifted), math.log(1 - lifted)).sum()
