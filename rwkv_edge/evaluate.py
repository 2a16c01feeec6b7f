"""How well a model predicts text: perplexity over windows, compared pair by pair."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .runtime import Model
from .runtime.sampling import log_softmax

Array = npt.NDArray[np.float64]


def log_probabilities(model: Model, window: Sequence[int]) -> Array:
    """Log-probabilities (T - 1, V) of every next token of a window, read from the start, in nats."""
    logits, _ = model.feed(window[:-1], every=True)
    return log_softmax(logits)


def nll(log_p: Array, window: Sequence[int]) -> Array:
    """Negative log-likelihood (T - 1,) of what did come next, in nats."""
    found: Array = -log_p[np.arange(len(window) - 1), np.asarray(window[1:])]
    return found


@dataclass(frozen=True)
class Cost:
    """What one model loses against another on the same windows.

    percent  of perplexity
    error    standard error of percent: paired, windows being independent
    """

    percent: float
    error: float


def cost(nll_model: Array, nll_reference: Array) -> Cost:
    """Compare two models' nll (windows, T - 1)."""
    d = (nll_model - nll_reference).mean(axis=1)
    mean = float(d.mean())
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    return Cost(100 * math.expm1(mean), 100 * math.exp(mean) * error)
