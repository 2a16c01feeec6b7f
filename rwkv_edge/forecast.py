"""What a bundle will take before there is one: bytes on disk, memory, and the speed to expect of this machine."""

import math
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .bundle import dump_manifest
from .errors import InputError
from .exporters import coreml, onnx
from .qtensor import Plan, Recipe, packed_bytes
from .spec import Shape, Spec

# Memory. Measured in processes of their own with onnxruntime 1.32 on Linux x86-64 (RssAnon, RssFile and smaps after every
# stage), RWKV-7 of 0.1, 0.4 and 1.5 billion parameters at five recipes, and narrow ones of 12 to
# 61 layers; RWKV-4, 5.2 and 6 of 0.2 billion at int4 agree with them
PROCESS = 30_000_000  # Python, numpy, onnxruntime and this package
LIBRARIES = 48_000_000  # their code, of which a file is behind
TOKENIZER = 25  # for every byte of its file
NODE = 5_000  # onnxruntime's own, for every node of the graph
LIVE, LIVE_LAYER = 22, 2.15  # activations (T, C) that its arena holds for a chunk of T tokens, and for every layer
ARENAS = 2  # times that: it first learns what a chunk needs, then allocates that at once
STATES = 4  # a model's loop and a generation's, each with two sets of buffers

# Speed. Decoding with one thread and with two on Zen 4, the best of several runs, fitted to what `bandwidth` told there: 0.1
# and 0.4 billion parameters at five recipes. Weights that fit the processor's cache, a few million, are faster than this.
EFFICIENCY = {32: 0.88, 16: 0.88, 8: 0.68, 4: 0.62}  # share of the bandwidth that the products reach, by bits
# In exact arithmetic onnxruntime has a fast product for 4 bits and none for 8: measured with a 60M model on one thread, int8
# decoded at 11 to 15 tok/s in place of 138, int4 (whose low-rank factors have 8 bits) at 70 to 83 in place of 260
EXACT_EFFICIENCY = EFFICIENCY | {8: 0.043}
NODE_S = 2.5e-6  # for every node of the graph

_RECORD = 96  # bytes before every tensor in a package's file of weights, with what aligns it
_SAMPLE = 128 << 20  # bytes, several times a cache


@dataclass(frozen=True)
class Forecast:
    """What one recipe gives.

    nbytes           of the bundle on disk
    bits_per_weight  of its weights, scales included
    peak_bytes       of memory while a long prompt is read, on the CPU, files included but for RWKV-7a's tables
    anonymous_bytes  of it backed by no file: what cannot be given back under pressure
    read_bytes       of weights that one token reads, as onnxruntime holds them: float16 is widened, a block has two scales
    tok_s            threads -> tokens a second to expect of decoding
    fits             whether the peak is within the memory asked about; None if none was
    """

    recipe: str
    nbytes: int
    bits_per_weight: float
    peak_bytes: int
    anonymous_bytes: int
    read_bytes: int
    tok_s: Mapping[int, float]
    fits: bool | None


def forecast(
    spec: Spec,
    plan: Plan,
    *,
    recipe: str,
    bandwidth: Mapping[int, float],
    tokenizer_bytes: int = 0,
    wkv: str = "attention",
    exact: bool = False,
    nbytes: int | None = None,
    memory: int | None = None,
) -> Forecast:
    """Say what a bundle of this plan takes, and how fast it decodes.

    recipe           what to call the plan
    bandwidth        threads -> bytes a second, as `bandwidth` measures
    tokenizer_bytes  of the tokenizer's file
    exact            whether it computes quantized products in float32
    nbytes           of the bundle, if there is one
    memory           in bytes, to be fitted into

    Error  on the machine and the models that the constants are from: bundle 0.05 %, memory 7 % (float16 10 %: loading leaves
           gaps), speed 25 % where nothing else runs.
    """
    layout = onnx.Layout(spec, plan)
    step = onnx.record(spec, plan, layout, wkv=wkv, exact=exact)
    efficiency = EXACT_EFFICIENCY if exact else EFFICIENCY
    weights = [(plan[name], w.shape) for name, w in spec.weights.items() if w.kind not in ("embedding", "table")]
    read = sum(_held(*pair) for pair in weights)
    mapped = plan["emb.weight"].nbytes(spec.weights["emb.weight"].shape)
    mapped += sum(packed_bytes(s, r.bits, r.block)[1] for r, s in weights if r.block)

    chunk = 4 * step.about["T"] * spec.n_embd * (LIVE + LIVE_LAYER * spec.n_layer)
    anonymous = PROCESS + TOKENIZER * tokenizer_bytes + read + NODE * len(step.g.nodes) + STATES * spec.state_bytes
    anonymous += int(ARENAS * chunk)
    peak = LIBRARIES + anonymous + mapped

    n_graphs = 1 if step.about["arithmetic"] == "exact" else 2
    if nbytes is None:
        nbytes = layout.end + onnx.Layout.of_tables(spec, plan).end + n_graphs * step.nbytes + tokenizer_bytes
        nbytes += _manifest(spec, plan, n_graphs * [step.about])
    tok_s = {
        n: 1 / (sum(_held(r, s) / efficiency[r.bits] for r, s in weights) / rate + NODE_S * len(step.g.nodes))
        for n, rate in bandwidth.items()
    }
    fits = None if memory is None else peak <= memory
    return Forecast(recipe, nbytes, bits_per_weight(spec, plan), peak, anonymous, read, tok_s, fits)


@dataclass(frozen=True)
class CoremlForecast:
    """What one recipe gives for Core ML, whose memory and speed only a Mac or a phone can tell.

    nbytes           of the bundle on disk
    bits_per_weight  of its weights, scales and tables included
    packages         how many, and how many bytes the largest has
    state_bytes      of a state, in float16
    """

    recipe: str
    profile: str
    nbytes: int
    bits_per_weight: float
    packages: int
    largest_bytes: int
    state_bytes: int


def coreml_graph_bytes(spec: Spec, plan: Plan, profile: str) -> int:
    """Bytes of the packages but for their weights: those of one plan are about those of any, and take seconds to make.

    Raises  ExportError if coremltools is missing.
    """
    begins = [first for first, _ in coreml.split(spec, plan, profile)]
    packages = coreml.trace(spec, plan, profile=profile, state="explicit", begins=begins)
    return sum(len(data) for p in packages for data in p.files().values())


def coreml_forecast(
    spec: Spec, plan: Plan, *, recipe: str, profile: str, graph_bytes: int, tokenizer_bytes: int = 0
) -> CoremlForecast:
    """Say what a Core ML bundle of this plan takes.

    recipe           what to call the plan
    graph_bytes      of its packages without weights, as `coreml_graph_bytes` gives
    tokenizer_bytes  of the tokenizer's file

    Error  of the bundle's bytes .5 %, measured on the demo model and on 1.5 billion parameters
    """
    parts = [nbytes for _, nbytes in coreml.split(spec, plan, profile)]
    records = _RECORD * sum(2 if r.rows or r.block else 1 for r in plan.values())
    if profile == "gpu":  # a linear layer without a bias has zeros, the same for all of one width
        records += 2 * sum({w.shape[0] for w in spec.weights.values() if w.kind in ("matrix", "head", "low_rank")})
    tables = onnx.Layout.of_tables(spec, plan).end
    manifest = sum(350 if r.rows or r.block else 300 for r in plan.values()) + 700 * len(spec.state_tensors) + 3_000
    return CoremlForecast(
        recipe,
        profile,
        sum(parts) + records + graph_bytes + tables + manifest + tokenizer_bytes,
        bits_per_weight(spec, plan),
        len(parts),
        max(parts),
        spec.state_bytes // 2,
    )


def bits_per_weight(spec: Spec, plan: Plan) -> float:
    """Of the weights by this plan, scales and tables included."""
    return 8 * sum(plan[name].nbytes(w.shape) for name, w in spec.weights.items()) / spec.n_parameters


def _held(recipe: Recipe, shape: Shape) -> int:
    """Bytes of a matrix as onnxruntime holds and reads it."""
    if recipe.block is None:
        return 4 * math.prod(shape)  # float16 is widened when it is loaded
    codes, scales = packed_bytes(shape, recipe.bits, recipe.block)
    return codes + 2 * scales  # every block's sum beside its scale; the scales in the file stay mapped


def _manifest(spec: Spec, plan: Plan, graphs: list[dict[str, object]]) -> int:
    """About the bytes of the manifest: the graphs' as it has them, the rest by number."""
    tensors = sum(283 if recipe.block else 243 for recipe in plan.values())
    return len(dump_manifest({"graphs": graphs})) + tensors + 103 * len(spec.state_tensors) + 1_900


def bandwidth() -> dict[int, float]:
    """Measure how fast memory is read, in bytes a second: by one thread, and by one on every core.

    numpy reads 128 MiB, again and again; the fastest counts, for other programs only slow it down.
    It takes about half a second.
    """
    x = np.ones(_SAMPLE // 8, np.int64)
    cores = os.cpu_count() or 1
    found = {}
    for n in dict.fromkeys((1, cores)):
        parts, seconds = np.array_split(x, n), list[float]()
        with ThreadPoolExecutor(n) as pool:
            end = time.perf_counter() + 0.2
            while len(seconds) < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                list(pool.map(np.bitwise_or.reduce, parts))
                seconds.append(time.perf_counter() - start)
        found[n] = x.nbytes / min(seconds)
    return found


_UNITS = {"": 1, "b": 1} | {f"{p}{b}": k**i for b, k in (("b", 1000), ("ib", 1024)) for i, p in enumerate("kmgt", 1)}


def parse_size(text: str) -> int:
    """Give the bytes of a size such as 4GB, 512 MiB or 4000000000.

    Raises  InputError
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) *([a-z]*)", text.strip().lower(), re.A)
    if not found or found[2] not in _UNITS:
        raise InputError(f"{text!r} is no size: expected a number of bytes, or of kB, MB, GB, KiB, MiB or GiB, such as 4GB")
    return int(float(found[1]) * _UNITS[found[2]])
