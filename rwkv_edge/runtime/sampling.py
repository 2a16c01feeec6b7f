"""From logits to a token: pure functions, and the settings they take.

The order is that of the `rwkv` package: bans, biases and penalties change logits; top_k, top_p and min_p look at the
probabilities that follow, typical_p at what these leave; the temperature comes last.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, InputError

Array = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
_BLOCK = 128  # tokens of a block whose best one counts when the most likely are looked for


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.  A bundle has its own: Model.sampling.

    temperature        0 takes the most likely token; above, log-probabilities are divided by it
    top_k              keep so many of the most likely tokens; 0 keeps all
    top_p              keep the fewest most likely tokens whose probabilities reach this sum, from 0 to 1
    min_p              keep tokens at least so likely, as a share of the most likely one
    typical_p          keep the tokens whose surprise is nearest to the expected one, up to this sum
    presence_penalty   taken from the logit of every token that was generated before
    frequency_penalty  taken from it once more for every time that it was
    penalty_decay      what is left of such a time at every further token
    ban                ids of tokens that are never chosen
    bias               id -> what is added to its logit
    seed               the same seed gives the same tokens; None a different one each time

    Raises  InputError if one of these is out of range.
    Source  penalties and their decay: `rwkv` package, utils.py; typical_p: arXiv 2202.00666
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    ban: Sequence[int] = ()
    bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, bounds in _RANGES.items():
            _refuse_outside(name, getattr(self, name), bounds)
        for name in ("top_k", "seed"):
            if (name, getattr(self, name)) != ("seed", None):
                object.__setattr__(self, name, _whole(getattr(self, name), f"{name} {{!r}} is not possible"))
        try:
            ban, bias = list(self.ban), dict(self.bias)
        except (TypeError, ValueError) as e:
            raise InputError("ban is a list of token ids, and bias a mapping from ids to numbers") from e
        object.__setattr__(self, "ban", tuple(_whole(i, "{!r} is no token id") for i in ban))
        object.__setattr__(self, "bias", {_whole(i, "{!r} is no token id"): x for i, x in bias.items()})
        for token, x in self.bias.items():
            _refuse_outside(f"bias of token {token}", x, _LOGIT)

    @property
    def penalizes(self) -> bool:
        """Whether what was said changes what is said next."""
        return bool(self.presence_penalty or self.frequency_penalty)


def changed(sampling: Sampling, settings: Mapping[str, Any]) -> Sampling:
    """Give a Sampling with some settings changed.

    Raises  TypeError, as a function would for an argument that it does not have; InputError for one out of range.
    """
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling is a {type(sampling).__name__}: expected a Sampling")
    unknown = settings.keys() - Settings.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no setting {min(unknown)!r}: expected one of {', '.join(Settings.__annotations__)}")
    return replace(sampling, **settings)


class Settings(TypedDict, total=False):
    """The fields of Sampling, each as an option."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    presence_penalty: float
    frequency_penalty: float
    penalty_decay: float
    ban: Sequence[int]
    bias: Mapping[int, float]
    seed: int | None


_SHARE = (math.ulp(0), 1.0, "more than 0, at most 1")
_LOGIT = (-1e4, 1e4, "-10000 to 10000")
_RANGES = {
    "temperature": (0.0, sys.float_info.max, "0 or more"),
    "top_p": _SHARE,
    "min_p": (0.0, 1.0, "0 to 1"),
    "typical_p": _SHARE,
    "presence_penalty": _LOGIT,
    "frequency_penalty": _LOGIT,
    "penalty_decay": (0.0, 1.0, "0 to 1"),
}


def _refuse_outside(name: str, x: object, bounds: tuple[float, float, str]) -> None:
    low, high, expected = bounds
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not low <= x <= high:
        raise InputError(f"{name} {x!r:.40} is not possible: expected {expected}")


def _whole(x: object, what: str) -> int:
    """A whole number from 0 on, numpy's as well."""
    if not hasattr(x, "__index__") or isinstance(x, bool) or x.__index__() < 0:
        raise InputError(f"{what.format(x)}: expected a whole number, 0 or more")
    return int(x.__index__())


class Occurrences:
    """What was generated so far, as the penalties see it.

    seen    (V,) 1 or 0
    counts  (V,) an occurrence k tokens ago counts decay**k

    before  a state's: what was generated before, by id
    """

    def __init__(self, n_vocab: int, before: Mapping[int, float] | None = None) -> None:
        self.seen = np.zeros(n_vocab, np.float32)
        self.counts = np.zeros(n_vocab, np.float32)
        for token, count in (before or {}).items():
            self.seen[token], self.counts[token] = 1, count

    def add(self, token: int, text: str | None, decay: float) -> None:
        """Take one more token.

        text  of the token: digits, a space and a tab are seen and not counted, as the `rwkv` package has it
        """
        self.counts *= decay
        self.seen[token] = 1
        self.counts[token] += text is None or text not in " \t0123456789"

    def by_id(self) -> dict[int, float]:
        """Give the tokens that were seen, with their counts: what a state keeps."""
        ids = np.flatnonzero(self.seen)
        return dict(zip(ids.tolist(), self.counts[ids].tolist(), strict=True))


def penalize(logits: Array, occurrences: Occurrences, *, presence: float, frequency: float) -> Array:
    """Take from the logits (V,) what was said already: presence once, frequency by count."""
    return logits - (presence * occurrences.seen + frequency * occurrences.counts)


def adjust(logits: Array, sampling: Sampling, occurrences: Occurrences) -> Array:
    """Bans, penalties and biases: logits (V,), the same array if there are none."""
    if sampling.penalizes:
        logits = penalize(logits, occurrences, presence=sampling.presence_penalty, frequency=sampling.frequency_penalty)
    if sampling.ban or sampling.bias:
        logits = logits.copy()
        for token, x in sampling.bias.items():
            logits[token] += x
        logits[list(sampling.ban)] = -np.inf
    return logits


def log_softmax(logits: Array) -> Probabilities:
    """Log-probabilities over the last axis, in float64.

    Raises  BackendError if logits are not numbers: the model diverged.
    """
    x = logits.astype(np.float64)
    x -= _top(logits)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def log_normalizer(logits: Array) -> float:
    """What to take from logits (V,) for log-probabilities; to 1e-6, in a tenth of the time of log_softmax.

    Raises  BackendError as log_softmax
    """
    top = _top(logits)
    return float(top[0]) + math.log(np.exp(logits - top).sum(dtype=np.float64))


def _top(logits: Array) -> Array:
    top: Array = logits.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        raise BackendError("the model gave logits that are not finite: check the bundle with `rwkv-edge check`")
    return top


# --- which tokens stay; p is sorted, the most likely first ---


def top_p(p: Probabilities, threshold: float) -> int:
    """Give how many of the most likely tokens are the fewest whose probabilities sum to the threshold."""
    return min(int(np.searchsorted(p.cumsum(), threshold * (1 - 1e-12))) + 1, len(p))


def min_p(p: Probabilities, share: float) -> int:
    """Give how many tokens are at least so likely, as a share of the most likely one."""
    return int((p >= share * (1 - 1e-12) * p[0]).sum())


def typical(p: Probabilities, threshold: float) -> Ids:
    """Give the fewest tokens that sum to the threshold, those first whose surprise is nearest to its expectation.

    p        (n,) in any order, with sum 1
    Returns  their places in p, in p's order
    Source   arXiv 2202.00666
    """
    with np.errstate(divide="ignore"):
        surprise = -np.log(p)
    expected = p @ np.where(p > 0, surprise, 0)
    order = np.argsort(np.abs(surprise - expected), kind="stable")
    return np.sort(order[: top_p(p[order], threshold)])


def candidates(logits: Array, sampling: Sampling) -> tuple[Ids, Probabilities]:
    """Give the ids that top_k, top_p, min_p and typical_p leave, and their log-probabilities: logits (V,)."""
    s = sampling
    z = log_normalizer(logits)
    if s.top_k == 0 and s.top_p == 1 and s.min_p == 0:
        kept: Ids = np.flatnonzero(logits > -np.inf)
    else:
        kept = most_likely(logits)
        n = _n_kept(np.exp(logits[kept].astype(np.float64) - z), s)
        if n == len(kept) < len(logits):  # perhaps more
            kept = np.argsort(-logits, kind="stable")
            n = _n_kept(np.exp(logits[kept].astype(np.float64) - z), s)
        kept = kept[:n]
    log_p = logits[kept].astype(np.float64) - z
    if s.typical_p < 1:
        p = np.exp(log_p)
        places = typical(p / p.sum(), s.typical_p)
        kept, log_p = kept[places], log_p[places]
    return kept, log_p


def _n_kept(p: Probabilities, s: Sampling) -> int:
    n = min(s.top_k or len(p), int((p > 0).sum()))
    return min(n, top_p(p, s.top_p) if s.top_p < 1 else n, min_p(p, s.min_p))


def most_likely(logits: Array, n: int = 1) -> Ids:
    """Give the ids of the most likely tokens, some hundreds but at least n, the most likely first, equals by id.

    Half of the blocks have a token as likely as the median of their best: few others do, and they need not be sorted.
    """
    n_blocks = len(logits) // _BLOCK
    if n_blocks < 8 or n > n_blocks // 2:
        return np.argsort(-logits, kind="stable")
    best = logits[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(1)
    likely = np.flatnonzero(logits >= np.partition(best, n_blocks // 2)[n_blocks // 2])
    return likely[np.argsort(-logits[likely], kind="stable")]


def sample(logits: Array, sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose a token by its logits (V,), bans, biases and penalties being in them.

    Raises  BackendError if they are not numbers: the model diverged.
    """
    if sampling.temperature == 0:
        _top(logits)
        return int(logits.argmax())
    kept, log_p = candidates(logits, sampling)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, so 0
        cumulative = np.exp((log_p - log_p.max()) / sampling.temperature).cumsum()
    at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(kept[min(at, len(kept) - 1)])
