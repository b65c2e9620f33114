"""What one knows of pen strokes without a network. Sequences are (T, 3), normalised."""

import math
from collections.abc import Callable

import numpy as np


def one_mixture(train: list[np.ndarray], components: int) -> Callable[[np.ndarray], float]:
    """The trivial baseline that knows no context: one mixture of all offsets, one probability that the pen is lifted.

    Returns:
        What gives the nats of a sequence's points after the first.
    """
    from sklearn.mixture import GaussianMixture

    points = np.concatenate([sequence[1:] for sequence in train]).astype(np.float64)
    some = points[:: max(1, len(points) // 20_000), :2]
    mixture = GaussianMixture(min(components, len(some)), reg_covar=1e-4, max_iter=30, random_state=0).fit(some)
    pen = _pen(points)
    return lambda sequence: pen(sequence) - mixture.score_samples(sequence[1:, :2].astype(np.float64)).sum()


def last_offset(train: list[np.ndarray]) -> Callable[[np.ndarray], float]:
    """The trivial baseline that the pen goes on as before: a Gaussian around the last offset.

    Returns:
        What gives the nats of a sequence's points after the first.
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
    """Nats of the pen's bits after the first, with one probability for all."""
    lifted = (points[:, 2].sum() + 1) / (len(points) + 2)
    return lambda sequence: -np.where(sequence[1:, 2] > 0.5, math.log(lifted), math.log(1 - lifted)).sum()
