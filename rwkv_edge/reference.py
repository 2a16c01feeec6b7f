"""The reference: the step as numpy executes it, on weights that are read when they are needed."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import Pieces, Stored
from .models import model_of
from .ops import HalfConstants, Numpy
from .qtensor import Lut, QTensor
from .spec import Spec

Array = npt.NDArray[Any]


class Weights(Mapping[str, Array | QTensor | Lut]):
    """Weights by name, read when asked for and not kept: one tensor in memory at a time."""

    def __init__(self, tensors: Mapping[str, Stored | Pieces]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array | QTensor | Lut:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def run_reference(
    spec: Spec,
    weights: Mapping[str, Array | QTensor | Lut],
    ids: list[int],
    state: Mapping[str, Array] | None = None,
    *,
    wkv_form: str = "step",
    dtype: npt.DTypeLike = np.float32,
    half_scales: tuple[float, float] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Run the step in numpy: the reference.

    state  `{layer}.{tensor}` in the shapes of the spec, wkv as [head, value, key]; None begins anew
    half_scales  round the numbers in the formulas (eps, e^-.5) to float16, as a Core ML graph has them that keeps at these
                 scales what layer norms and head norms take; None does not round

    Returns  logits (T, V) of every token, and the state after the last
    """
    F = Numpy(spec.n_head, wkv_form, dtype)
    if half_scales is not None:
        F = HalfConstants(spec.n_head, wkv_form, dtype, half_scales)
    key_first = wkv_form == "linear_attention"

    def turn(x: Array) -> Array:
        return x.swapaxes(-1, -2) if key_first and x.ndim >= 3 and x.shape[-1] == x.shape[-2] == spec.head_size else x

    inside = {}
    for name, t in spec.state_tensors.items():
        x = np.full(t.shape, t.first, dtype) if state is None else state[name].astype(dtype)
        inside[name] = turn(x)[None] if len(t.shape) == 3 else x.reshape(1, 1, -1)
    tokens = np.asarray(ids, np.int64)
    with np.errstate(over="ignore", invalid="ignore"):  # weights that overflow give what they give
        logits, new = model_of(spec.version).step(F, weights, spec, tokens, np.arange(len(ids)), inside)
    return logits, {n: turn(new[n]).reshape(t.shape) for n, t in spec.state_tensors.items()}
