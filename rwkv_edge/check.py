"""Does a bundle compute its own weights, are they its checkpoint's, and what did making it cost?

The weights are read from the bundle's files by a reader of the proof's own, the numpy reference runs on them, and the graphs
are held against it. That the files hold the right weights, only a checkpoint can show.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import mil
from .bundle import MANIFEST, Bundle, read_bundle
from .checkpoints import Checkpoint, model_id, open_checkpoint
from .checkpoints.lora import with_lora
from .errors import BackendError, BundleError, CheckFailed, CheckpointError, InputError
from .exporters import coreml as coreml_exporter
from .models import spec_of
from .proof import THIS_RELEASE, Proof, prove_weights
from .reference import Weights, run_reference
from .runtime import Model, Sampling
from .runtime.sampling import log_softmax, sample
from .runtime.session import ARITHMETIC_KL, arithmetic_warning
from .runtime.session import Loop as OnnxLoop
from .unpacking import Weights as StoredWeights

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

# The reference is float64. How far float32 may stray from it depends on the model: numpy's own float32 step tells. A
# graph is right if it strays at most so many times as far: measured .4 to 2.5 (the most at 1.5B, over 16 tokens), with one
# small fault 5 to 70. Floors are for models that hardly stray at all; the demo model's graphs are 5e-6 off.
EXACT_RATIO, EXACT_FLOOR = 8.0, 5e-5
STATE_RATIO, STATE_FLOOR = 16.0, 1e-3
# Activations rounded to 8 bits move logits by .005 to .05 rms, more where weights amplify; two unrelated answers are 1.4
# apart. This limit sees a broken kernel. It cannot see a small fault of the graph: so the graph must also be the exact
# one, byte for byte, but for the accuracy level.
INT8_RMS_LIMIT = 0.5
# Our interpreter computes a Core ML package in float64, the reference the same formulas with the same constants: measured
# 1e-14 to 1e-12. One wrong bit of a weight shows as 1e-6 or more.
COREML_EXACT = 1e-10
# In float16 a sound graph gives 1e-6 to 1e-3 nats; this limit sees a model that float16 does not hold.
COREML_NATIVE_KL = 1e-2
COREML_NATIVE_STATE = 1.0  # measured .02 to .1, and above 2 where the memory was lost

TOKENS, COREML_TOKENS = 320, 64  # more than a graph takes at a time; the interpreter is slow
MAX_TOKENS = 65536  # the reference keeps the logits of all of them


@dataclass(frozen=True)
class Difference:
    """How far logits are from a reference's, over some tokens.

    n        how many tokens
    max_abs  largest difference, in standard deviations of the reference's logits
    rms      root mean square of the differences, in the same unit
    kl       nats per token, from the reference's distribution to these logits'
    top1     share of tokens with the same most likely next token
    """

    n: int
    max_abs: float
    rms: float
    kl: float
    top1: float


@dataclass(frozen=True)
class Row:
    """One graph, read in one way.

    file, arithmetic  of the graph
    fed      how many tokens at a time
    own      against the bundle's own weights
    state    largest difference of a final state tensor, in its own standard deviations
    cost     against the checkpoint, or None
    fault    why the graph does not compute the bundle's own weights; empty if it does
    """

    file: str
    arithmetic: str
    fed: str
    own: Difference
    state: float
    cost: Difference | None
    fault: str

    @property
    def ok(self) -> bool:
        """Whether the graph computes the bundle's own weights."""
        return not self.fault


@dataclass(frozen=True)
class Report:
    """What `check` found.

    limits    what is allowed: exact_max, exact_state, int8_rms; of Core ML native_kl and native_state; arithmetic_kl is
              what 8-bit activations may cost without a warning
    rounding  how far numpy's float32 step is from the float64 reference: the measure of what a graph may be off
    packages  of a Core ML bundle: which of its files are not what this release of rwkv-edge writes for its weights; None if
              another release has made it
    weights   the numpy reference on the bundle's weights against the checkpoint: the cost of quantization alone, or None
    proof     whether the bundle's files hold the checkpoint's weights, tensor by tensor
    arithmetic  what 8-bit activations, or Core ML's float16, cost alone: the graphs that run against the float64 reference on
              the same weights, the reading of the largest KL; None if all graphs are exact
    warnings  that 8-bit activations cost more than limits' arithmetic_kl, which is no failure
    """

    bundle: Path
    n_tokens: int
    rows: tuple[Row, ...]
    limits: dict[str, float]
    rounding: Difference
    packages: tuple[str, ...] | None
    weights: Difference | None
    proof: Proof
    arithmetic: Difference | None
    warnings: tuple[str, ...]

    @property
    def computes(self) -> bool:
        """Whether every graph computes the bundle's own weights."""
        return all(row.ok for row in self.rows) and not self.packages

    @property
    def ok(self) -> bool:
        """Whether it does, and nothing shows that these are not the checkpoint's."""
        return self.computes and not self.proof.faults

    def raise_if_failed(self) -> None:
        """Raise CheckFailed, with this report, if weights are wrong or a graph does not compute them."""
        if self.proof.faults:
            raise CheckFailed(f"{self.bundle}: {self.proof.fault}", self)
        bad = next((row for row in self.rows if not row.ok), None)
        if bad:
            raise CheckFailed(f"{self.bundle / bad.file} does not compute the bundle's weights: {bad.fault}", self)
        if self.packages:
            raise CheckFailed(
                f"{self.bundle / self.packages[0]} is not what this release writes: export the bundle again", self
            )


def check(
    bundle: str | Path,
    against: str | Path | None = None,
    *,
    lora: str | Path | None = None,
    n_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold a bundle's graphs against the numpy reference on the bundle's own weights, read from disk.

    With a checkpoint, hold these weights against its own, tensor by tensor: floats are its rounded ones; codes, scales and
    tables are what their method declares, and no worse than quantizing again. Without, only the graphs are proven.

    The tokens are sampled from the bundle itself, so that they are what the model is about. Every graph reads them
    one by one, and as many at a time as it takes.

    against   the checkpoint the bundle was made from: its weights are compared, and what quantization cost is measured
    lora      that was merged into it, as FILE or FILE:ALPHA
    n_tokens  at least 2; more than a graph takes at a time (256), or its longest chunks go unchecked. Of a Core ML bundle
              it is rounded up to whole calls of prefill, 16 each. None is 320, for Core ML 64
    progress  called with how much is done and how much there is

    Raises  BundleError, BackendError; CheckpointError if the checkpoint is another model's; CheckFailed if the bundle
            gives no finite logits. A bundle whose numbers differ gives a report that is not ok.
    """
    if n_tokens is not None and not 2 <= n_tokens <= MAX_TOKENS:
        raise InputError(f"{n_tokens} tokens cannot be compared: expected 2 to {MAX_TOKENS}")
    b = read_bundle(bundle)
    coreml = b.target == "coreml"
    n_tokens = n_tokens or (COREML_TOKENS if coreml else TOKENS)
    if coreml:
        _refuse_what_is_no_model(b)
        whole = b.graph("prefill")["T"]  # it takes neither more nor fewer
        n_tokens = -(-n_tokens // whole) * whole
    source = _source(against, lora) if against else None
    n_rows = 4 if coreml else 2 * len(b.manifest["graphs"])
    passes = _Passes(progress, 3 + n_rows + (2 if source else 0))
    if source:
        found = model_id(source, passes.part)
        if found != b.model_id:
            raise CheckpointError(f"{against} is another model ({found[:12]}) than {bundle} was made from ({b.model_id[:12]})")
        passes.end()
    proof = prove_weights(b, source, passes.part)
    passes.end()
    answers = _answers(b, source, _tokens(b, n_tokens, threads, proof), passes)
    rows, limits = _interpret(b, answers, passes) if coreml else _run(b, answers, threads, passes)
    weights = difference(answers.logits, answers.original) if answers.original is not None else None
    packages = _not_as_written(b) if coreml else None
    arithmetic = _costliest(rows)
    warnings = arithmetic_warning(bundle, arithmetic.kl) if arithmetic and not coreml else ()
    return Report(Path(bundle), n_tokens, tuple(rows), limits, answers.rounding, packages, weights, proof, arithmetic, warnings)


@dataclass
class _Passes:
    """Progress over passes that take about the same time."""

    progress: Progress | None
    total: int
    ended: int = 0

    def part(self, done: int, total: int) -> None:
        """So much of the current pass is done."""
        if self.progress:
            self.progress(1000 * self.ended + 1000 * done // total, 1000 * self.total)

    def end(self) -> None:
        self.ended += 1
        self.part(0, 1)


@dataclass(frozen=True)
class _Answers:
    """What the reference gives for some tokens on the bundle's weights in float64, and how far float32 is from it.

    original  the logits on the checkpoint's weights, or None
    """

    ids: list[int]
    logits: Array
    state: Mapping[str, Array]
    rounding: Difference
    state_rounding: float
    original: Array | None


def _source(against: str | Path, lora: str | Path | None) -> Checkpoint:
    source = open_checkpoint(against)
    if source.quantized:
        raise CheckpointError(f"{against} is quantized itself: give the original checkpoint to measure the cost")
    return with_lora(source, lora)


def _tokens(b: Bundle, n_tokens: int, threads: int | None, proof: Proof) -> tuple[list[int], Mapping[str, Array] | None]:
    """Tokens that the bundle writes, and the state it begins from."""
    model = Model(b, threads=threads, interpret="native" if b.target == "coreml" else None)
    try:
        ids = _sample(model, n_tokens)
    except CheckFailed as e:
        if proof.faults:
            raise CheckFailed(f"{b.path}: {proof.fault}; and {e}", None) from e
        raise
    return ids, model.first.tensors if model.first else None


def _answers(
    b: Bundle, source: Checkpoint | None, tokens: tuple[list[int], Mapping[str, Array] | None], passes: _Passes
) -> _Answers:
    """Run the reference on the bundle's weights, as the proof reads them, and on the checkpoint's."""
    ids, first = tokens
    options: dict[str, Any] = {}
    if b.target == "coreml":
        graph = b.graph("decode")
        options = {"wkv_form": graph["wkv"], "half_scales": (graph["scales"]["residual"], graph["scales"]["heads"])}
    stored = StoredWeights(b.path, b.manifest["tensors"])
    logits, state = run_reference(b.spec, stored, ids, first, dtype=np.float64, **options)
    passes.end()
    single, single_state = run_reference(b.spec, stored, ids, first, **options)
    passes.end()
    original = None
    if source:
        original, _ = run_reference(source.spec, Weights(source.tensors), ids, first, dtype=np.float64)
        passes.end()
    return _Answers(ids, logits, state, difference(single, logits), _state_apart(single_state, state), original)


def _costliest(rows: Sequence[Row]) -> Difference | None:
    """Of graphs that are not exact, the largest difference from exact arithmetic."""
    return max((row.own for row in rows if row.arithmetic != "exact"), key=lambda own: own.kl, default=None)


def _run(b: Bundle, answers: _Answers, threads: int | None, passes: _Passes) -> tuple[list[Row], dict[str, float]]:
    """What onnxruntime computes, graph by graph: token by token, and as many at a time as it takes."""
    limit = max(EXACT_FLOOR, EXACT_RATIO * answers.rounding.max_abs)
    state_limit = max(STATE_FLOOR, STATE_RATIO * answers.state_rounding)
    limits = {"exact_max": limit, "exact_state": state_limit, "int8_rms": INT8_RMS_LIMIT, "arithmetic_kl": ARITHMETIC_KL}
    rows = []
    for graph in b.manifest["graphs"]:
        model = Model(b, threads=threads, exact=graph["role"] == "exact")
        for size in dict.fromkeys((1, min(graph["T"], len(answers.ids)))):
            rows.append(_read(model, graph, size, answers, limits))
            passes.end()
    return rows, limits


def _read(model: Model, graph: Mapping[str, Any], size: int, answers: _Answers, limits: Mapping[str, float]) -> Row:
    """What one graph computes, reading so many tokens at a time."""
    fed = f"{size} at a time"
    parts, s = [], None
    for i in range(0, len(answers.ids), size):
        part, s = model.feed(answers.ids[i : i + size], s, every=True)
        parts.append(part)
    assert s is not None
    logits = np.concatenate(parts)
    own, apart = difference(logits, answers.logits), _state_apart(s.tensors, answers.state)
    exact, fault = graph["arithmetic"] == "exact", ""
    limit, state_limit = limits["exact_max"], limits["exact_state"]
    if exact and not (own.max_abs <= limit and apart <= state_limit):
        fault = (
            f"reading {fed}, logits differ by {own.max_abs:.2g} of their deviation (allowed {limit:.2g}), "
            f"the state by {apart:.2g} of its (allowed {state_limit:.2g})"
        )
    elif not exact and not own.rms <= INT8_RMS_LIMIT:
        fault = f"reading {fed}, logits differ by {own.rms:.2g} rms of their deviation (allowed {INT8_RMS_LIMIT})"
    elif not exact and not _is_exact_but_for_accuracy(model.bundle):
        fault = "it is not the exact graph with 8-bit activations"
    cost = difference(logits, answers.original) if answers.original is not None else None
    return Row(graph["file"], graph["arithmetic"], fed, own, apart, cost, fault)


def _interpret(b: Bundle, answers: _Answers, passes: _Passes) -> tuple[list[Row], dict[str, float]]:
    """What our interpreter computes from the packages' own files, in float64 and in float16."""
    limits = {"exact_max": COREML_EXACT, "exact_state": COREML_EXACT}
    limits |= {"native_kl": COREML_NATIVE_KL, "native_state": COREML_NATIVE_STATE}
    rows = []
    for arithmetic in ("exact", "native"):
        for role in ("decode", "prefill"):
            rows.append(_interpreted(b, arithmetic, role, answers))
            passes.end()
    return rows, limits


def _interpreted(b: Bundle, arithmetic: str, role: str, answers: _Answers) -> Row:
    """What one function of a bundle's packages computes."""
    model = Model(b, interpret=arithmetic)
    graphs = [g for g in b.manifest["graphs"] if g["role"] == role]
    size = graphs[0]["T"]
    loop, at = model.loop(), range(size - 1, len(answers.ids), size)
    assert not isinstance(loop, OnnxLoop)
    logits = loop.run(role, np.array(answers.ids))
    apart, fed = _state_apart(loop.tensors(), answers.state), f"{size} at a time"
    name = graphs[0]["file"] if len(graphs) == 1 else f"{len(graphs)} parts"
    if not np.isfinite(logits).all():
        none = Difference(len(at), math.inf, math.inf, math.inf, 0.0)
        return Row(f"{name} {role}", arithmetic, fed, none, apart, none, f"reading {fed}, it gives logits that are not finite")
    own, fault = difference(logits, answers.logits[at]), ""
    if arithmetic == "exact" and not (own.max_abs <= COREML_EXACT and apart <= COREML_EXACT):
        fault = (
            f"reading {fed}, logits differ by {own.max_abs:.2g} of their deviation and the state by {apart:.2g} of its "
            f"(allowed {COREML_EXACT:.0e})"
        )
    elif arithmetic == "native" and not (own.kl <= COREML_NATIVE_KL and apart <= COREML_NATIVE_STATE):
        fault = (
            f"reading {fed}, float16 gives logits of KL {own.kl:.2g} (allowed {COREML_NATIVE_KL}) and a state {apart:.2g} of "
            f"its deviation off (allowed {COREML_NATIVE_STATE:g})"
        )
    cost = difference(logits, answers.original[at]) if answers.original is not None else None
    return Row(f"{name} {role}", arithmetic, fed, own, apart, cost, fault)


def _refuse_what_is_no_model(b: Bundle) -> None:
    """Raise BundleError if the manifest's tensors and state are not those of a model of its version."""
    try:
        spec = spec_of({name: t.shape for name, t in b.tensors.items()})
    except CheckpointError as e:
        raise BundleError(f"{b.path / MANIFEST} is damaged: {e}") from e
    firsts = [(t.name, t.shape, coreml_exporter.first_value(t)) for t in spec.state]
    if spec.sizes != b.spec.sizes or firsts != [(t.name, t.shape, t.first) for t in b.spec.state]:
        raise BundleError(f"{b.path / MANIFEST} is damaged: its sizes and its state are not those of its tensors")


def _not_as_written(b: Bundle) -> tuple[str, ...] | None:
    """Which files of a Core ML bundle are not those that this release writes for its weights; None if another made it.

    What the interpreter cannot judge, such as a description of inputs or what cancels in float64, is in them too.
    """
    if b.manifest["made_by"] != THIS_RELEASE:
        return None
    graphs = b.manifest["graphs"]
    lies_in = {
        name: entries[0]["file"].partition("/")[0]
        for name, entries in b.manifest["tensors"].items()
        if isinstance(entries, list)
    }
    places = [lies_in.get(f"blocks.{i}.ln1.weight") for i in range(b.spec.n_layer)] + [lies_in.get("ln_out.weight")]
    begins = [places.index(f) if f in places else -1 for f in dict.fromkeys(g["file"] for g in graphs)]
    plan = {name: t.recipe for name, t in b.tensors.items()}
    if begins != sorted(set(begins)) or begins[0] != 0 or plan.keys() != b.spec.weights.keys():
        return (MANIFEST,)
    packages = coreml_exporter.trace(b.spec, plan, profile=graphs[0]["profile"], state=graphs[0]["state"], begins=begins)
    wrong = []
    for package in packages:
        found = mil.Package(b.path / package.file)
        if found.model != type(found.model).FromString(package.model):
            wrong.append(f"{package.file}/{mil.MODEL}")
        package.model = (b.path / package.file / mil.MODEL).read_bytes()  # the other file's ids are made from it
        wrong += [name for name, content in package.files().items() if (b.path / name).read_bytes() != content]
    if graphs != [g for role in coreml_exporter.FUNCTIONS for p in packages for g in p.graphs if g["role"] == role]:
        wrong.append(MANIFEST)
    return tuple(wrong)


def _is_exact_but_for_accuracy(bundle: Bundle) -> bool:
    """Whether what was proved of the exact graph holds for the one that runs: MatMulNBits' accuracy level aside.

    In an ONNX file an attribute is its name, then tag 0x18 and its integer.
    """
    run, exact = ((bundle.path / bundle.graph(role)["file"]).read_bytes() for role in ("run", "exact"))
    return bool(run.replace(b"accuracy_level\x18\x04", b"accuracy_level\x18\x00") == exact)


def _sample(model: Model, n_tokens: int) -> list[int]:
    """Let the model write its own test: sampled, so that it does not repeat itself."""
    rng, sampling = np.random.default_rng(0), Sampling()
    ids, state = [model.bos_token_id], None
    try:
        while len(ids) < n_tokens:
            logits, state = model.feed(ids[-1:], state)
            ids.append(sample(logits, sampling, rng))
    except BackendError as e:
        where = f"{model.bundle.path}, after {len(ids)} tokens"
        if model.interpreted:
            raise CheckFailed(
                f"{where}: the logits are not finite: the packages are wrong, or float16 does not hold this model", None
            ) from e
        raise CheckFailed(f"{where}: {e}", None) from e
    return ids


def difference(logits: Array, reference: Array) -> Difference:
    """Compare logits (T, V) with a reference's."""
    unit = float(reference.std()) or 1.0
    d = (logits.astype(np.float64) - reference) / unit
    p, q = log_softmax(reference), log_softmax(logits)
    return Difference(
        n=len(logits),
        max_abs=float(np.abs(d).max()),
        rms=float(np.sqrt((d * d).mean())),
        kl=max(0.0, float((np.exp(p) * (p - q)).sum(-1).mean())),  # rounding may take it below
        top1=float((logits.argmax(-1) == reference.argmax(-1)).mean()),
    )


def _state_apart(state: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    """Largest difference of any state tensor, in its own standard deviations; NaN if one is.

    RWKV-4's sums aa and bb stand for aa e^pp and bb e^pp, whatever pp is: they are compared by the reference's.
    """
    state = dict(state)
    with np.errstate(over="ignore", invalid="ignore"):
        for pp in [n for n in reference if n.endswith(".pp")]:
            for sums in (pp[:-2] + "aa", pp[:-2] + "bb"):
                state[sums] = state[sums] * np.exp(state[pp] - reference[pp])
            state[pp] = reference[pp]
    return float(np.max([np.abs(state[n] - x).max() / (x.std() or 1.0) for n, x in reference.items()]))
