"""Checkpoint -> (quantize) -> exporter -> bundle: the one place that composes them."""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from . import __version__
from .bundle import FORMAT, MANIFEST, dump_manifest, read_bundle, sha256_of, tensor_entry, why_not_replace
from .checkpoints import QUANTIZED, Checkpoint, ModelId, open_checkpoint, verify
from .checkpoints.initial_state import read_initial_state
from .checkpoints.lora import with_lora
from .checkpoints.safetensors import header
from .errors import ExportError, InputError, OutputError, QuantizeError
from .exporters import onnx
from .files import Record, Stored, new_directory, new_file
from .qtensor import Plan, QTensor, Recipe
from .quantize import plan as make_plan
from .quantize import rtn
from .runtime import State
from .spec import Shape
from .tokenizer import World, open_tokenizer, tokenizer_beside

Progress = Callable[[int, int], None]
WEIGHTS = "weights.bin"
TABLES = "deep_embed.bin"  # what a step reads a row per token of
INITIAL_STATE = "initial_state.safetensors"


def _sampling(**settings: float) -> dict[str, float]:
    """A bundle's defaults."""
    return {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.7,
        "min_p": 0.0,
        "typical_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "penalty_decay": 0.996,
    } | settings


# Source: BlinkDL/RWKV-LM, RWKV-v7 chat prompts, and the sampling suggested for the G1 models
TEMPLATES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "rwkv": {
        "system": "System: {}\n\n",
        "user": "User: {}\n\n",
        "assistant": "Assistant:",
        "turn_end": "\n\n",
        "stop": ["\n\nUser:", "\n\nSystem:"],
        "think": {
            "none": {"opening": "", "sampling": None},
            "fast": {"opening": " <think>\n</think", "sampling": _sampling(top_p=0.28, top_k=32)},
            "think": {
                "opening": " <think",
                "sampling": _sampling(
                    temperature=0.96, top_p=0.76, top_k=32, presence_penalty=1.0, frequency_penalty=0.1, penalty_decay=0.988
                ),
            },
        },
    },
}


@dataclass(frozen=True)
class Written:
    """What a command wrote: where, how many bytes, how many bits a weight takes; notes on what may surprise."""

    path: Path
    nbytes: int
    bits_per_weight: float
    model_id: str
    notes: tuple[str, ...] = ()


def quantize(
    checkpoint: str | Path,
    output: str | Path,
    *,
    quant: str = "int4",
    block: int | None = None,
    overrides: Sequence[str] = (),
    lora: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a quantized checkpoint: safetensors, with codes as MatMulNBits packs them and `{name}.scales` beside them.

    quant, block, overrides  see rwkv_edge.quantize.plan
    lora                     a LoRA to merge before rounding, as FILE or FILE:ALPHA
    progress                 called with weights done and weights in all

    Raises  CheckpointError, QuantizeError, OutputError
    """
    output = Path(output)
    source = with_lora(open_checkpoint(checkpoint), lora)
    plan = _plan(source, quant, block, overrides)
    entries: dict[str, tuple[str, Shape]] = {}
    for name, w in source.spec.weights.items():
        data, scales = _records(output, w.shape, plan[name], 0, 0)
        entries[name] = (data.dtype, data.shape)
        if scales:
            entries[f"{name}.scales"] = (scales.dtype, scales.shape)
    table = {
        name: {"shape": list(w.shape), "bits": plan[name].bits, "block": plan[name].block, "method": plan[name].method}
        for name, w in source.spec.weights.items()
    }
    about = {"format": 1, "model_id": "0" * 64, "sha256": "0" * 64, "tensors": table}
    read = {t.data.path for t in source.tensors.values()}  # of a folder, its shards
    if output.exists() and any(os.path.samefile(file, output) for file in read):
        raise OutputError(f"{output} is the checkpoint itself: choose another output")

    def head() -> bytes:
        return header(entries, {QUANTIZED: json.dumps(about, separators=(",", ":"))})

    with new_file(output, force=force) as temporary, open(temporary, "wb") as f:
        f.write(head())
        hashed = _Hashing(f)
        about["model_id"] = model_id = _write_tensors(source, plan, [(hashed, None)], progress)
        about["sha256"] = hashed.sha256.hexdigest()
        f.seek(0)
        f.write(head())  # of the same length: only the ids are known later
    return Written(output, output.stat().st_size, _bits_per_weight(source, plan), model_id, source.notes)


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    quant: str | None = None,
    block: int | None = None,
    overrides: Sequence[str] = (),
    lora: str | Path | None = None,
    initial_state: str | Path | None = None,
    wkv: str = "attention",
    tokenizer: str | Path | None = None,
    template: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a bundle for onnxruntime.

    quant, block, overrides  see rwkv_edge.quantize.plan; None is int4, or what a quantized checkpoint brings
    lora       a LoRA to merge before rounding, W + (alpha / r) B A, as FILE, or FILE:ALPHA where it does not say its alpha;
               the merged model is another model, with a model_id of its own
    initial_state  a state-tuned file, `blocks.0.att.time_state` and so on: every text begins from it
    wkv        "attention" (onnxruntime's operator, the fastest), "plain" (plain operations), "step" (one token a call)
    tokenizer  a tokenizer.json, or a World vocabulary (.txt); without it, the tokenizer.json beside the checkpoint, or what
               a Hugging Face folder has; without that, the World vocabulary for a model of its size, or else none
    template   how the model was taught to chat: "rwkv" (User: and Assistant:), or "none"; without it, rwkv with World
    progress   called with weights done and weights in all

    The same weights and options give the same bytes, whatever container the weights came in.

    Raises  CheckpointError, QuantizeError, ExportError, InputError, OutputError
    """
    output = Path(output)
    source = with_lora(open_checkpoint(checkpoint), lora)
    if wkv not in onnx.WKV_FORMS:
        raise ExportError(f"wkv {wkv!r} is unknown: expected one of {', '.join(onnx.WKV_FORMS)}")
    if template is not None and template not in TEMPLATES:
        raise ExportError(f"template {template!r} is unknown: expected one of {', '.join(TEMPLATES)}")
    spec, plan = source.spec, _plan(source, quant, block, overrides)
    verify(source)
    first = read_initial_state(initial_state, spec) if initial_state else None
    tokenizer_file, tokenizer_about = _tokenizer(source, tokenizer)
    layout = onnx.Layout(spec, plan)
    graphs = {"run": onnx.trace(spec, plan, layout, wkv=wkv, exact=False, weights_file=WEIGHTS)}
    if graphs["run"].about["arithmetic"] != "exact":
        graphs["exact"] = onnx.trace(spec, plan, layout, wkv=wkv, exact=True, weights_file=WEIGHTS)

    with new_directory(output, replaceable=why_not_replace if force else None) as folder:
        names = {"run": "model.onnx", "exact": "exact.onnx"}
        for role, graph in graphs.items():
            (folder / names[role]).write_bytes(graph.data)
        if tokenizer_file:
            (folder / tokenizer_about["file"]).write_bytes(tokenizer_file.read_bytes())
        layouts = {WEIGHTS: layout} | ({TABLES: onnx.Layout.of_tables(spec, plan)} if spec.tables else {})
        with contextlib.ExitStack() as stack:
            files = [(stack.enter_context(open(folder / file, "wb")), layout) for file, layout in layouts.items()]
            model_id = _write_tensors(source, plan, files, progress)
        if first:
            State(model_id, 0, first).save(folder / INITIAL_STATE)
        tensors = {}
        for name, w in spec.weights.items():
            file = TABLES if w.kind == "table" else WEIGHTS
            places = layouts[file].places
            at = [places[part].offset if part in places else 0 for part in ((name, "data"), (name, "scales"))]
            data, scales = _records(folder / file, w.shape, plan[name], *at)
            r = plan[name]
            stored = Stored(name, w.shape, data, bits=r.bits, block=r.block, scales=scales, method=r.method)
            tensors[name] = tensor_entry(stored, w.kind)
        manifest = {
            "format": FORMAT,
            "model_id": model_id,
            "spec": spec.sizes,
            "state": [
                {"name": name, "shape": list(t.shape), "dtype": "float32", "first": t.first}
                for name, t in spec.state_tensors.items()
            ],
            "graphs": [{"file": names[role], "role": role, **graph.about} for role, graph in graphs.items()],
            "tensors": tensors,
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(folder.iterdir())
            },
            "initial_state": INITIAL_STATE if first else None,
            "tokenizer": tokenizer_about or None,
            "prompt": TEMPLATES[template or ("rwkv" if tokenizer_about.get("kind") == World.kind else "none")],
            "sampling": _sampling(),
            "made_by": {"tool": "rwkv-edge", "version": __version__},
        }
        (folder / MANIFEST).write_bytes(dump_manifest(manifest))
        nbytes = sum(file.stat().st_size for file in folder.iterdir())
        read_bundle(folder, verify=False)  # what we write, we can read
    notes = () if tokenizer_file else (f"no tokenizer.json beside {source.path.name}: the bundle takes and gives token ids",)
    return Written(output, nbytes, _bits_per_weight(source, plan), model_id, (*source.notes, *notes))


def _plan(source: Checkpoint, quant: str | None, block: int | None, overrides: Sequence[str]) -> Plan:
    if not source.quantized:
        return make_plan(source.spec, quant or "int4", block=block, overrides=overrides)
    if quant is not None or block is not None or overrides:
        raise QuantizeError(
            f"{source.path} is quantized already: give the original checkpoint, or leave --quant, --block and --override out"
        )
    return {name: Recipe(t.bits, t.block, t.method) for name, t in source.tensors.items()}


def _bits_per_weight(source: Checkpoint, plan: Plan) -> float:
    nbytes = sum(plan[name].nbytes(w.shape) for name, w in source.spec.weights.items())
    return 8 * nbytes / source.spec.n_parameters


def _tokenizer(source: Checkpoint, given: str | Path | None) -> tuple[Path | None, dict[str, Any]]:
    file = Path(given) if given else tokenizer_beside(source.path, source.spec.n_vocab)
    if file is None:
        return None, {}
    if not file.is_file():
        raise InputError(f"the tokenizer {file} does not exist")
    tokenizer = open_tokenizer(file)
    # a table padded to a multiple of 128 or so is common, less than that is another model's
    if not tokenizer.n_vocab <= source.spec.n_vocab < tokenizer.n_vocab + 1024:
        raise InputError(
            f"{file} has {tokenizer.n_vocab} tokens, but the model has {source.spec.n_vocab}: it belongs to another "
            "model; give the right one with --tokenizer"
        )
    name = "rwkv_vocab.txt" if tokenizer.kind == World.kind else "tokenizer.json"
    return file, {"kind": tokenizer.kind, "file": name, "end_of_text": tokenizer.end_of_text}


# --- streaming the tensors ---


def _records(file: Path, shape: Shape, r: Recipe, data_at: int, scales_at: int) -> tuple[Record, Record | None]:
    """The records of one stored tensor."""
    if r.block is None:
        return Record(file, data_at, f"F{r.bits}", shape), None
    n_blocks = -(-shape[1] // r.block)
    packed = Record(file, data_at, "U8", (shape[0], n_blocks, r.block * r.bits // 8))
    return packed, Record(file, scales_at, "F32", (shape[0], n_blocks))


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, f: BinaryIO) -> None:
        self._f, self.sha256 = f, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._f.write(data)
        self.sha256.update(data)

    def tell(self) -> int:
        return self._f.tell()


def _write_tensors(
    source: Checkpoint,
    plan: Plan,
    files: Sequence[tuple["BinaryIO | _Hashing", onnx.Layout | None]],
    progress: Progress | None,
) -> str:
    """Write every tensor, in blocks of rows, to its place or, without a layout, one after the other.

    Returns  the model's id
    """
    digest, done, total = ModelId(), 0, source.spec.n_parameters
    for f, layout in files:
        for name in dict.fromkeys(name for name, _ in layout.places) if layout else source.tensors:
            t = source.tensors[name]
            scales: list[npt.NDArray[np.float32]] = []
            if layout:
                _pad(f, layout.places[name, "data"].offset)
            for rows, data, s in _encode(t, plan[name]):
                f.write(data)
                if s is not None:
                    scales.append(s)
                if not source.quantized:
                    digest.update(name, t.shape, rows)
                done += len(data) and rows.size
                if progress:
                    progress(done, total)
            if scales:
                if layout:
                    _pad(f, layout.places[name, "scales"].offset)
                for s in scales:
                    f.write(s.data)
        if layout:
            _pad(f, layout.end)
    return source.known_id or digest.hexdigest()


def _pad(f: "BinaryIO | _Hashing", offset: int) -> None:
    assert 0 <= offset - f.tell() < 4096, "tensors are written in the order of their places"
    f.write(bytes(offset - f.tell()))


_Encoded = tuple[npt.NDArray[Any], memoryview, npt.NDArray[np.float32] | None]


def _encode(t: Stored, recipe: Recipe) -> Iterator[_Encoded]:
    """Read, round and pack a tensor in blocks of rows: all cores work, a few blocks are in memory."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[Any] = deque()
        for start in range(0, t.shape[0], t.rows_per_read):
            pending.append(pool.submit(partial(_encode_rows, t, recipe, start)))
            if len(pending) > 2 * (os.cpu_count() or 1):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode_rows(t: Stored, recipe: Recipe, start: int) -> _Encoded:
    rows = t.rows(start, min(start + t.rows_per_read, t.shape[0]))
    if isinstance(rows, QTensor):
        return rows.codes, rows.pack().reshape(-1).data, rows.scales
    if recipe.block is not None:
        q = rtn(rows, bits=recipe.bits, block=recipe.block)
        return rows, q.pack().reshape(-1).data, q.scales
    if recipe.bits == 16:
        if np.abs(rows).max() > np.finfo(np.float16).max:
            raise QuantizeError(f"{t.name} holds {np.abs(rows).max():g}, beyond float16: use --override '{t.name}=32'")
        half = rows.astype("<f2")
        exact = rows.astype(np.float64)
        if not np.square(half - exact).mean() <= 1e-6 * np.square(exact).mean():
            raise QuantizeError(f"{t.name} is too small for float16, which keeps little of it: use --override '{t.name}=32'")
        return rows, half.reshape(-1).view(np.uint8).data, None
    return rows, rows.reshape(-1).view(np.uint8).data, None
