"""Does a bundle compute its own weights, and what did making it cost?

The weights are read from the bundle's files, the numpy reference runs on them, and the graphs are held against it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import read_bundle
from .checkpoints import model_id, open_checkpoint
from .errors import BackendError, CheckFailed, CheckpointError, InputError
from .files import Stored
from .models import model_of
from .ops import Numpy
from .qtensor import QTensor
from .runtime import Model, Sampling
from .runtime.sampling import log_softmax, sample
from .spec import Spec

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

# max |difference| of the logits, in standard deviations of the logits, and of each state tensor in its own.
# Exact: float32 in another order of summation; measured 3e-6 to 2e-5 on the demo model and on random ones.
EXACT_LIMIT = 1e-4
EXACT_STATE_LIMIT = 1e-3
# Activations rounded to 8 bits: measured .005 to .02 rms on the demo model, up to .05 on random weights, which amplify.
# A wrong sign, scale or weight gives .3 and more.
INT8_RMS_LIMIT = 0.1


@dataclass(frozen=True)
class Difference:
    """How far logits are from a reference's, over some tokens.

    max_abs  largest difference, in standard deviations of the reference's logits
    rms      root mean square of the differences, in the same unit
    kl       nats per token, from the reference's distribution to these logits'
    top1     share of tokens with the same most likely next token
    """

    max_abs: float
    rms: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Row:
    """One graph, read in one way.

    own      against the bundle's own weights
    state    largest difference of a final state tensor, in its own standard deviations
    cost     against the checkpoint, or None
    ok       whether the graph computes the bundle's own weights
    """

    file: str
    arithmetic: str
    fed: str
    own: Difference
    state: float
    cost: Difference | None
    ok: bool


@dataclass(frozen=True)
class Report:
    """What `check` found.

    weights  the numpy reference on the bundle's weights against the checkpoint: the cost of quantization alone, or None
    """

    bundle: Path
    n_tokens: int
    rows: tuple[Row, ...]
    weights: Difference | None

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def raise_if_failed(self) -> None:
        """Raise CheckFailed, with this report, if a graph does not compute the bundle's weights."""
        bad = next((row for row in self.rows if not row.ok), None)
        if bad:
            raise CheckFailed(
                f"{self.bundle / bad.file} ({bad.fed}) does not compute the bundle's weights: logits differ by "
                f"{bad.own.max_abs:.2g} of their deviation at most, {bad.own.rms:.2g} rms, state by {bad.state:.2g}",
                self,
            )


def check(
    bundle: str | Path,
    against: str | Path | None = None,
    *,
    n_tokens: int = 160,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold a bundle's graphs against the numpy reference on the bundle's own weights, read from disk.

    The tokens are sampled from the bundle itself, so that they are what the model is about. Every graph reads them
    one by one and in chunks.

    against   the checkpoint the bundle was made from: what quantization cost is measured too
    n_tokens  at least 2
    progress  called with passes done and passes in all

    Raises  BundleError, BackendError; CheckpointError if the checkpoint is another model's; CheckFailed if the bundle
            gives no finite logits. A bundle whose numbers differ gives a report that is not ok.
    """
    if n_tokens < 2:
        raise InputError(f"{n_tokens} tokens are too few: expected 2 or more")
    b = read_bundle(bundle)
    source = open_checkpoint(against) if against else None
    roles = [str(g["role"]) for g in b.manifest["graphs"]]
    total, done = 1 + 2 * len(roles) + (2 if source else 0), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    if source:
        found = model_id(source)
        if found != b.model_id:
            raise CheckpointError(f"{against} is another model ({found[:12]}) than {bundle} was made from ({b.model_id[:12]})")
        step()
    ids = _sample(Model(b, threads=threads), n_tokens)
    reference, state = run_reference(b.spec, Weights(b.tensors), ids)
    step()
    original = None
    if source:
        original, _ = run_reference(source.spec, Weights(source.tensors), ids)
        step()

    rows = []
    for role in roles:
        model, graph = Model(b, threads=threads, role=role), b.graph(role)
        exact = graph["arithmetic"] == "exact"
        for fed, size in (("one by one", 1), (f"{_chunk(n_tokens)} at a time", _chunk(n_tokens))):
            parts, s = [], None
            for i in range(0, n_tokens, size):
                part, s = model.feed(ids[i : i + size], s, every=True)
                parts.append(part)
            assert s is not None
            logits = np.concatenate(parts)
            own = difference(logits, reference)
            apart = max(_relative(s.tensors[name], state[name]) for name in state)
            if exact:
                ok = own.max_abs <= EXACT_LIMIT and apart <= EXACT_STATE_LIMIT
            else:
                ok = own.rms <= INT8_RMS_LIMIT
            cost = difference(logits, original) if original is not None else None
            rows.append(Row(graph["file"], graph["arithmetic"], fed, own, apart, cost, bool(ok)))
            step()
    weights = difference(reference, original) if original is not None else None
    return Report(Path(bundle), n_tokens, tuple(rows), weights)


def _chunk(n_tokens: int) -> int:
    return max(2, n_tokens // 3)  # uneven: the last chunk is a short one


def _sample(model: Model, n_tokens: int) -> list[int]:
    """Let the model write its own test: sampled, so that it does not repeat itself."""
    rng, sampling = np.random.default_rng(0), Sampling()
    about = model.bundle.manifest["tokenizer"]
    ids, state = [int((about and about["end_of_text"]) or 0)], None
    try:
        while len(ids) < n_tokens:
            logits, state = model.feed(ids[-1:], state)
            ids.append(sample(logits, sampling, rng))
    except BackendError as e:
        raise CheckFailed(f"{model.bundle.path}: {e}", None) from e
    return ids


class Weights(Mapping[str, Array | QTensor]):
    """Weights by name, read when asked for and not kept: one tensor in memory at a time."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array | QTensor:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def run_reference(
    spec: Spec,
    weights: Mapping[str, Array | QTensor],
    ids: list[int],
    state: Mapping[str, Array] | None = None,
    *,
    wkv_form: str = "step",
    dtype: npt.DTypeLike = np.float32,
) -> tuple[Array, dict[str, Array]]:
    """Run the step in numpy: the reference.

    state  `{layer}.{tensor}` in the shapes of the spec, wkv as [head, value, key]; None begins anew

    Returns  logits (T, V) of every token, and the state after the last
    """
    F = Numpy(spec.n_head, wkv_form, dtype)
    key_first = wkv_form == "linear_attention"

    def turn(x: Array) -> Array:
        return x.swapaxes(-1, -2) if key_first and x.ndim >= 3 and x.shape[-1] == x.shape[-2] == spec.head_size else x

    inside = {}
    for name, t in spec.state_tensors.items():
        x = np.full(t.shape, t.first, dtype) if state is None else state[name].astype(dtype)
        inside[name] = turn(x)[None] if len(t.shape) == 3 else x.reshape(1, 1, -1)
    tokens = np.asarray(ids, np.int64)
    logits, new = model_of(spec.version).step(F, weights, spec, tokens, np.arange(len(ids)), inside)
    return logits, {n: turn(new[n]).reshape(t.shape) for n, t in spec.state_tensors.items()}


def difference(logits: Array, reference: Array) -> Difference:
    """Compare logits (T, V) with a reference's."""
    unit = float(reference.std()) or 1.0
    d = (logits.astype(np.float64) - reference) / unit
    p, q = log_softmax(reference), log_softmax(logits)
    return Difference(
        max_abs=float(np.abs(d).max()),
        rms=float(np.sqrt((d * d).mean())),
        kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        top1=float((logits.argmax(-1) == reference.argmax(-1)).mean()),
    )


def _relative(x: Array, reference: Array) -> float:
    return float(np.abs(x - reference).max() / (reference.std() or 1.0))
