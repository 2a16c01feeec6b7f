"""From logits to a token: pure functions, and the settings they take."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, InputError

Array = npt.NDArray[np.float32]
_LIKELY = 512  # tokens looked at before the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature  0 takes the most likely token; above, logits are divided by it
    top_p        keep the fewest most likely tokens whose probabilities reach this sum, from 0 to 1
    seed         the same seed gives the same tokens; None a different one each time

    Raises  InputError if one of these is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("temperature", (int, float)), ("top_p", (int, float)), ("seed", (int, type(None)))):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{name} {getattr(self, name)!r} is not a number of the kind expected")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature {self.temperature} is not possible: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not possible: expected more than 0, at most 1")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed {self.seed} is not possible: expected 0 or more")


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def top_p(p: npt.NDArray[np.float64], threshold: float) -> npt.NDArray[np.int64]:
    """Give the fewest most likely tokens whose probabilities sum to the threshold, most likely first; equals by id."""
    likely = np.arange(len(p)) if len(p) <= _LIKELY else np.sort(np.argpartition(-p, _LIKELY)[:_LIKELY])
    if p[likely].sum() < threshold or (p == p[likely].min()).sum() > 1:  # the cut may run through equals
        likely = np.arange(len(p))
    order = likely[np.argsort(-p[likely], kind="stable")]
    n = int(np.searchsorted(p[order].cumsum(), threshold * (1 - 1e-12))) + 1
    return order[:n]


def sample(logits: Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose a token; logits (V,).

    Raises  BackendError if the logits are not numbers: the model diverged.
    """
    if not np.isfinite(logits.max()):
        raise BackendError("the model gave logits that are not finite: check the bundle with `rwkv-edge check`")
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    p = np.exp(scaled - np.log(np.exp(scaled).sum()))
    kept = top_p(p, sampling.top_p) if sampling.top_p < 1 else np.arange(len(p))
    cumulative = p[kept].cumsum()
    at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(kept[min(at, len(kept) - 1)])
