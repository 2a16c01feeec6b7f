"""What flows into a model's matrices: the step, observed while it reads a text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import QuantizeError
from ..models import model_of
from ..ops import Numpy
from ..qtensor import Array
from ..spec import Spec

Progress = Callable[[int, int], None]

_FORM = "chunk"


def mean_squares(
    spec: Spec, weights: Mapping[str, Any], ids: Sequence[int], *, progress: Progress | None = None
) -> dict[str, Array]:
    """Run the step in float32, from its first state, and give for every matrix the mean of x^2 of each of its inputs.

    weights   by name; every one but the head is read once for each chunk of 32 or 64 tokens, and not kept. The head, the
              largest, is not read: its inputs are enough
    ids       tokens to read
    progress  called with tokens done and tokens in all

    Returns  name -> (I,) float32, of every matrix that `F.linear` takes
    Raises   QuantizeError if there are no tokens, one is not in the vocabulary, or the step overflows.
    """
    tokens = np.asarray(ids, np.int64)
    if not tokens.size:
        raise QuantizeError("a calibration without tokens measures nothing: give some text")
    if tokens.min() < 0 or tokens.max() >= spec.n_vocab:
        raise QuantizeError(f"tokens from {tokens.min()} to {tokens.max()}: the vocabulary has {spec.n_vocab}")
    model = model_of(spec.version)
    chunk: int = model.MAX_TOKENS[_FORM]
    F, named = _Observer(spec.n_head, _FORM), _Named(spec, weights)
    state: dict[str, Any] = {}
    for name, t in spec.state_tensors.items():
        x = np.full(t.shape, t.first, np.float32)
        state[name] = x[None] if len(t.shape) == 3 else x.reshape(1, 1, -1)
    for i in range(0, len(tokens), chunk):
        part = tokens[i : i + chunk]
        with np.errstate(over="ignore", invalid="ignore"):  # told of below
            _, state = model.step(F, named, spec, part, np.arange(len(part)), state)
        if progress:
            progress(i + len(part), len(tokens))
    means = {name: (total / len(tokens)).astype(np.float32) for name, total in F.totals.items()}
    wrong = next((name for name, x in means.items() if not np.isfinite(x).all()), None)
    if wrong:
        raise QuantizeError(f"what flows into {wrong} overflows float32: this model cannot be calibrated on this text")
    return means


@dataclass(frozen=True)
class _Matrix:
    """A matrix that knows its name, read when `linear` computes with it."""

    name: str
    read: Callable[[], Any]


class _Named(Mapping[str, Any]):
    """Weights of which those that `linear` takes know their names."""

    def __init__(self, spec: Spec, weights: Mapping[str, Any]) -> None:
        self._spec, self._weights = spec, weights

    def __getitem__(self, name: str) -> Any:
        if self._spec.weights[name].kind in ("matrix", "low_rank", "head"):
            return _Matrix(name, lambda: self._weights[name])
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spec.weights)

    def __len__(self) -> int:
        return len(self._spec.weights)


class _Observer(Numpy):
    """Compute, and add up what flows into every matrix.

    totals  name -> (I,) float64
    """

    def __init__(self, n_head: int, wkv_form: str) -> None:
        super().__init__(n_head, wkv_form)
        self.totals: dict[str, Any] = {}

    def linear(self, x: Any, W: Any, bias: Any = None) -> Any:
        y = x.astype(np.float64).reshape(-1, x.shape[-1])
        self.totals[W.name] = self.totals.get(W.name, 0.0) + np.einsum("ti,ti->i", y, y)
        if W.name == "head.weight":
            return x  # nobody looks at the logits
        return super().linear(x, W.read(), bias)
