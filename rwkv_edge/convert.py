"""Checkpoint -> (quantize) -> exporter -> bundle: the one place that composes them."""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from . import __version__
from .bundle import (
    FORMAT,
    MANIFEST,
    coreml_tensor_entry,
    dump_manifest,
    read_bundle,
    sha256_of,
    tensor_entry,
    why_not_replace,
)
from .checkpoints import QUANTIZED, Checkpoint, ModelId, open_checkpoint, verify
from .checkpoints.initial_state import first_state
from .checkpoints.lora import with_lora
from .checkpoints.safetensors import header
from .errors import ExportError, InputError, OutputError, QuantizeError
from .exporters import coreml, onnx
from .files import CODES, Record, Stored, new_directory, new_file
from .forecast import bits_per_weight
from .qtensor import Array, Plan, QTensor, Recipe
from .quantize import COREML_DEFAULTS, COREML_QUANTS, coreml_plan, kmeans, mean_squares, rtn, with_half_scales
from .quantize import plan as make_plan
from .reference import Weights
from .runtime import State
from .spec import Shape, Spec, StateTensor
from .texts import Texts, find_texts

Progress = Callable[[int, int], None]
WEIGHTS = "weights.bin"
TABLES = "deep_embed.bin"  # what a step reads a row per token of
INITIAL_STATE = "initial_state.safetensors"
CALIBRATION = 8192  # tokens that are read at most


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
        "blank_lines": "collapse",  # one ends a turn
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
    # Source: github.com/openai/openai-python, chatml.md
    "chatml": {
        "system": "<|im_start|>system\n{}<|im_end|>\n",
        "user": "<|im_start|>user\n{}<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n",
        "turn_end": "<|im_end|>\n",
        "stop": ["<|im_end|>"],
        "blank_lines": "keep",
        "think": {"none": {"opening": "", "sampling": None}, "think": {"opening": "<think>\n", "sampling": None}},
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
    first, notes = first_state(source, None)
    state = {f"blocks.{i}.att.time_state": first[f"{i}.wkv"] for i in range(source.spec.n_layer)} if first else {}
    entries |= {name: ("F32", S.shape) for name, S in state.items()}
    # an earlier release would lose a tuned state without a word: 2
    about: dict[str, Any] = {
        "format": 2 if state else 1,
        "model_id": "0" * 64,
        "sha256": "0" * 64,
        "settings": source.spec.settings,
        "tensors": table,
    }
    read = {t.data.path for t in source.tensors.values()}  # of a folder, its shards
    if output.exists() and any(os.path.samefile(file, output) for file in read):
        raise OutputError(f"{output} is the checkpoint itself: choose another output")

    def head() -> bytes:
        return header(entries, {QUANTIZED: json.dumps(about, separators=(",", ":"))})

    with new_file(output, force=force) as temporary, open(temporary, "wb") as f:
        f.write(head())
        hashed = _Hashing(f)
        about["model_id"] = model_id = _write_tensors(source, plan, [(hashed, None)], progress)
        for S in state.values():
            hashed.write(S.astype("<f4").tobytes())
        about["sha256"] = hashed.sha256.hexdigest()
        f.seek(0)
        f.write(head())  # of the same length: only the ids are known later
    return Written(output, output.stat().st_size, bits_per_weight(source.spec, plan), model_id, (*source.notes, *notes))


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    quant: str | None = None,
    block: int | None = None,
    overrides: Sequence[str] = (),
    lora: str | Path | None = None,
    initial_state: str | Path | None = None,
    wkv: str | None = None,
    arithmetic: str | None = None,
    target: str = "onnx",
    profile: str | None = None,
    coreml_state: str | None = None,
    part_bytes: int | None = None,
    calibrate: str | Sequence[str] | None = None,
    tokenizer: str | Path | None = None,
    template: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a bundle for onnxruntime, or for Core ML.

    quant, block, overrides  see rwkv_edge.quantize.plan; None is int4, or what a quantized checkpoint brings
    lora       a LoRA to merge before rounding, W + (alpha / r) B A, as FILE, or FILE:ALPHA where it does not say its alpha;
               the merged model is another model, with a model_id of its own
    initial_state  a state-tuned file, `blocks.0.att.time_state` and so on: every text begins from it; None is the one that
               the checkpoint's own file holds, if any
    wkv        "attention" (onnxruntime's operator, the fastest; None), "plain" (plain operations), "step" (one token a call)
    arithmetic  with onnx, of quantized matrices: "int8" rounds activations to 8 bits, the fastest (None), and adds a graph that
               does not, for comparison; "exact" computes in float32
    target     "onnx", or "coreml": packages for macOS 15 and iOS 18, in float16; quants: see rwkv_edge.quantize.coreml_plan
    profile    with coreml, the unit it is laid out for: "ane", the Neural Engine (None), or "gpu"
    coreml_state   with coreml, "explicit" (tensors in and out; None), or "packed", one tensor that Core ML keeps
    part_bytes     with coreml, split into packages of about so many; None is what the unit takes, 1 GiB with ane
    calibrate      with lut4 and lut6, a text or several that the model reads first (8192 tokens at most): the larger an
                   input is on average, the more its weights count when tables are made. It needs a tokenizer
    tokenizer  a tokenizer.json, a World vocabulary (.txt), "world" for the built-in one, or "none"; without it, the first that
               fits the model: the checkpoint's own, in its folder or its GGUF; one beside its file; World by its size
    template   the chat template: "rwkv" (User: and Assistant:), "chatml", or "none"; without it, the checkpoint's if it is one
               of these, or else rwkv with World
    progress   called with weights done and weights in all

    The same weights and options give the same bytes, whatever container the weights came in.

    Raises  CheckpointError, QuantizeError, ExportError, InputError, OutputError
    """
    output = Path(output)
    source = with_lora(open_checkpoint(checkpoint), lora)
    _refuse(target, wkv, arithmetic, profile, coreml_state, part_bytes)
    if template is not None and template not in TEMPLATES:
        raise ExportError(f"template {template!r} is unknown: expected one of {', '.join(TEMPLATES)}")
    spec = source.spec
    if target == "coreml":
        plan = _coreml_plan(source, quant, profile or "ane", block, overrides)
    else:
        plan = _plan(source, quant, block, overrides)
        if arithmetic == "int8" and not any(r.block for r in plan.values()):
            raise ExportError("arithmetic 'int8' has no effect on float weights, which are computed exactly: leave it out")
    verify(source)
    first, state_notes = first_state(source, initial_state)
    texts = find_texts(source, tokenizer, template)
    ids = _calibration(plan, calibrate, texts) if calibrate is not None else []
    if ids:
        plan = {name: replace(r, method="weighted kmeans") if r.rows else r for name, r in plan.items()}
    if target == "coreml":
        beyond = [name for name, x in (first or {}).items() if np.abs(x).max() > np.finfo(np.float16).max]
        if beyond:
            raise ExportError(f"{initial_state or source.path}: {beyond[0]} is beyond float16, in which Core ML keeps states")
        made = _coreml_graphs(source, plan, profile or "ane", coreml_state or "explicit", part_bytes)
    else:
        made = _onnx_graphs(source, plan, wkv or "attention", exact=arithmetic == "exact")

    with new_directory(output, replaceable=why_not_replace if force else None) as folder:
        importance: Mapping[str, Array] = {}
        if ids:
            importance = mean_squares(spec, Weights(source.tensors), ids, progress=_part(progress, 0, 2))
            progress = _part(progress, 1, 2)
        for name, content in made.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        if texts.entry:
            (folder / texts.entry["file"]).write_bytes(texts.content)
        tables = onnx.Layout.of_tables(spec, plan)
        layouts = made.layouts | ({TABLES: tables} if spec.tables else {})
        with contextlib.ExitStack() as stack:
            files: list[_File] = []
            for name, layout in layouts.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                files.append((stack.enter_context(open(folder / name, "wb")), layout))
            model_id = _write_tensors(source, plan, files, progress, importance)
        if first:
            State(model_id, 0, first).save(folder / INITIAL_STATE)
        tensors: dict[str, Any] = {}
        for file, layout in layouts.items():
            if isinstance(layout, coreml.Layout):
                _coreml_entries(tensors, source, plan, folder, file, layout)
            else:
                _onnx_entries(tensors, source, plan, folder, file, layout)
        manifest = {
            "format": FORMAT,
            "model_id": model_id,
            "spec": spec.sizes | spec.settings,
            "state": [
                {"name": name, "shape": list(t.shape), "dtype": "float32", **made.state(t)}
                for name, t in spec.state_tensors.items()
            ],
            "graphs": made.about,
            "tensors": {name: tensors[name] for name in spec.weights},
            "files": {
                file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for file in _files(folder)
            },
            "initial_state": INITIAL_STATE if first else None,
            "tokenizer": texts.entry,
            "prompt": TEMPLATES[texts.template],
            "sampling": _sampling(),
            "made_by": {"tool": "rwkv-edge", "version": __version__},
        }
        (folder / MANIFEST).write_bytes(dump_manifest(manifest))
        nbytes = sum(file.stat().st_size for file in _files(folder))
        read_bundle(folder, verify=False)  # what we write, we can read
    notes = [*source.notes, *texts.notes, *state_notes, *(_eps_notes(spec) if target == "coreml" else [])]
    if ids and len(ids) < CALIBRATION // 8:
        notes.append(f"calibrated on {len(ids)} tokens, which are few: up to {CALIBRATION} are read")
    return Written(output, nbytes, bits_per_weight(source.spec, plan), model_id, tuple(notes))


def _eps_notes(spec: Spec) -> list[str]:
    """Of every eps that float16 does not hold within a factor of 2."""
    held = coreml.held_eps(spec)
    return [
        f"float16 cannot hold {name} {eps:g} at the scale of the stream: the graph has {held[name]:.2g}. "
        "check --against and eval measure what that costs"
        for name, eps in spec.settings.items()
        if not eps / 2 <= held[name] <= eps * 2
    ]


def _part(progress: Progress | None, i: int, n: int) -> Progress | None:
    """Progress of the i-th of n tasks as progress of all."""
    return None if progress is None else lambda done, total: progress(i * total + done, n * total)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _refuse(
    target: str,
    wkv: str | None,
    arithmetic: str | None,
    profile: str | None,
    coreml_state: str | None,
    part_bytes: int | None,
) -> None:
    """Refuse options that are unknown, or of the other target."""
    known: dict[str, tuple[object, Sequence[str]]] = {
        "target": (target, ("onnx", "coreml")),
        "wkv": (wkv, tuple(onnx.WKV_FORMS)),
        "arithmetic": (arithmetic, ("int8", "exact")),
        "profile": (profile, tuple(COREML_QUANTS)),
        "coreml_state": (coreml_state, ("explicit", "packed")),
    }
    for option, (value, values) in known.items():
        if value is not None and value not in values:
            raise ExportError(f"{option} {value!r} is unknown: expected one of {', '.join(values)}")
    if target == "coreml" and wkv is not None:
        raise ExportError(f"wkv {wkv!r} is of target onnx: a Core ML bundle has one form")
    if target == "coreml" and arithmetic is not None:
        raise ExportError(f"arithmetic {arithmetic!r} is of target onnx: a Core ML bundle computes in float16")
    for option, value in {"profile": profile, "coreml_state": coreml_state, "part_bytes": part_bytes}.items():
        if target == "onnx" and value is not None:
            raise ExportError(f"{option} {value} is for Core ML: give target coreml with it")
    if part_bytes is not None and part_bytes < 1:
        raise ExportError(f"part_bytes {part_bytes} is not possible: expected 1 or more")


@dataclass(frozen=True)
class _Graphs:
    """What a target's exporter made: files by name, layouts of files of weights, what a manifest says of the graphs.

    state  what a manifest says of a state tensor's numbers
    """

    files: dict[str, bytes]
    layouts: dict[str, "onnx.Layout | coreml.Layout"]
    about: list[dict[str, Any]]
    state: Callable[[StateTensor], dict[str, float]]


def _onnx_graphs(source: Checkpoint, plan: Plan, wkv: str, *, exact: bool) -> _Graphs:
    layout = onnx.Layout(source.spec, plan)
    graphs = {"run": onnx.trace(source.spec, plan, layout, wkv=wkv, exact=exact, weights_file=WEIGHTS)}
    if graphs["run"].about["arithmetic"] != "exact":
        graphs["exact"] = onnx.trace(source.spec, plan, layout, wkv=wkv, exact=True, weights_file=WEIGHTS)
    names = {"run": "model.onnx", "exact": "exact.onnx"}
    about = [{"file": names[role], "role": role, **graph.about} for role, graph in graphs.items()]
    return _Graphs(
        {names[role]: g.data for role, g in graphs.items()}, {WEIGHTS: layout}, about, lambda t: {"first": float(t.first)}
    )


def _coreml_graphs(source: Checkpoint, plan: Plan, profile: str, state: str, part_bytes: int | None) -> _Graphs:
    begins = [first for first, _ in coreml.split(source.spec, plan, profile, part_bytes)]
    packages = coreml.trace(source.spec, plan, profile=profile, state=state, begins=begins)
    files: dict[str, bytes] = {}
    for package in packages:
        files |= package.files()
    about = [g for role in coreml.FUNCTIONS for package in packages for g in package.graphs if g["role"] == role]
    return _Graphs(files, {p.weights: p.layout for p in packages}, about, partial(coreml.state_about, source.spec))


def _onnx_entries(
    tensors: dict[str, Any], source: Checkpoint, plan: Plan, folder: Path, file: str, layout: "onnx.Layout"
) -> None:
    """What a manifest says of the tensors in a file, by name."""
    for name in dict.fromkeys(name for name, _ in layout.places):
        w, r = source.spec.weights[name], plan[name]
        at = [layout.places[part].offset if part in layout.places else 0 for part in ((name, "data"), (name, "scales"))]
        data, scales = _records(folder / file, w.shape, r, *at)
        stored = Stored(name, w.shape, data, bits=r.bits, block=r.block, scales=scales, method=r.method)
        tensors[name] = tensor_entry(stored, w.kind)


def _coreml_entries(
    tensors: dict[str, Any], source: Checkpoint, plan: Plan, folder: Path, file: str, layout: "coreml.Layout"
) -> None:
    """The same of a package: every tensor as the rows that lie together."""
    for name, (start, stop), what in layout.places:
        if what != "data" or not name:
            continue
        w, r = source.spec.weights[name], plan[name]
        shape = (stop - start, *w.shape[1:])
        dtype = f"U{r.bits}" if r.rows else f"I{r.bits}" if r.block else f"F{r.bits}"
        at = layout.places[name, (start, stop), "data"].offset
        data = Record(folder / file, at, dtype, shape, packing=CODES.get(dtype))
        scales = None
        if (second := layout.places.get((name, (start, stop), "scales"))) is not None:
            n = shape[0] // r.rows if r.rows else shape[0]
            scales = Record(folder / file, second.offset, "F16", (n, second.nbytes // 2 // n))
        stored = Stored(name, shape, data, bits=r.bits, block=r.block, scales=scales, method=r.method, rows_per_table=r.rows)
        entry = coreml_tensor_entry(stored, file, w.kind, 1 / coreml.factor(source.spec, name))
        tensors.setdefault(name, []).append(entry)


def _coreml_plan(source: Checkpoint, quant: str | None, profile: str, block: int | None, overrides: Sequence[str]) -> Plan:
    if source.quantized:
        raise QuantizeError(f"{source.path} is quantized for onnxruntime: give the original checkpoint for Core ML")
    return coreml_plan(source.spec, quant or COREML_DEFAULTS[profile], profile, block=block, overrides=overrides)


def _plan(source: Checkpoint, quant: str | None, block: int | None, overrides: Sequence[str]) -> Plan:
    if not source.quantized:
        return make_plan(source.spec, quant or "int4", block=block, overrides=overrides)
    if quant is not None or block is not None or overrides:
        raise QuantizeError(
            f"{source.path} is quantized already: give the original checkpoint, or leave --quant, --block and --override out"
        )
    return {name: Recipe(t.bits, t.block, t.method) for name, t in source.tensors.items()}


def _calibration(plan: Plan, given: str | Sequence[str], texts: Texts) -> list[int]:
    """The tokens of a calibration, every text after the token that begins one."""
    if not any(r.rows for r in plan.values()):
        raise ExportError("calibrate is for tables: give quant lut4 or lut6, with target coreml")
    if texts.tokenizer is None:
        raise InputError("to calibrate takes a tokenizer, and none lies beside the checkpoint: give --tokenizer")
    documents = [given] if isinstance(given, str) else given
    ids = [i for text in documents if text for i in (texts.bos_token_id, *texts.tokenizer.encode(text))]
    if not ids:
        raise InputError("the text to calibrate on is empty")
    return ids[:CALIBRATION]


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


_File = tuple["BinaryIO | _Hashing", "onnx.Layout | coreml.Layout | None"]


def _write_tensors(
    source: Checkpoint,
    plan: Plan,
    files: Sequence[_File],
    progress: Progress | None,
    importance: Mapping[str, Array] | None = None,
) -> str:
    """Write every tensor, in blocks of rows, to its place or, without a layout, one after the other.

    importance  of the inputs of matrices that become tables, where it is known

    Returns  the model's id
    """
    digest, done, total = ModelId(source.spec), 0, source.spec.n_parameters
    for f, layout in files:
        if isinstance(layout, coreml.Layout):
            for name, rows in _write_package(f, source, plan, layout, importance or {}):
                digest.update(name, source.tensors[name].shape, rows)
                done += rows.size
                if progress:
                    progress(done, total)
            continue
        for name in dict.fromkeys(name for name, _ in layout.places) if layout else source.tensors:
            t = source.tensors[name]
            scales: list[npt.NDArray[np.float32]] = []
            if layout:
                _pad(f, layout.places[name, "data"].offset)
            for rows, data, s in _encode(t, plan[name], _encode_rows, 0, t.shape[0]):
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


def _write_package(
    f: "BinaryIO | _Hashing", source: Checkpoint, plan: Plan, layout: "coreml.Layout", importance: Mapping[str, Array]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Write a package's weights, record after record; gives the rows as the checkpoint has them."""
    f.write(layout.head)
    second: list[npt.NDArray[Any]] = []
    for (name, (start, stop), what), place in layout.places.items():
        _pad(f, place.offset - len(place.header))
        f.write(place.header)
        if not name:
            f.write(bytes(place.nbytes))
        elif what == "scales":  # follow their codes
            for s in second:
                f.write(s.data)
        else:
            second = []
            encode = partial(_encode_for_coreml, np.float32(coreml.factor(source.spec, name)), importance.get(name))
            for rows, data, table in _encode(source.tensors[name], plan[name], encode, start, stop):
                f.write(data)
                if table is not None:
                    second.append(table)
                yield name, rows
        assert f.tell() == place.offset + place.nbytes, (name, what)


_Encoded = tuple[npt.NDArray[Any], memoryview | bytes, npt.NDArray[Any] | None]
_Encode = Callable[[Stored, Recipe, int, int], _Encoded]


def _encode(t: Stored, recipe: Recipe, encode: _Encode, start: int, stop: int) -> Iterator[_Encoded]:
    """Read, round and pack rows of a tensor, block after block: all cores work, a few blocks are in memory."""
    per_table = recipe.rows or 1
    n_rows = max(1, t.rows_per_read // per_table) * per_table
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[Any] = deque()
        for at in range(start, stop, n_rows):
            pending.append(pool.submit(partial(encode, t, recipe, at, min(at + n_rows, stop))))
            if len(pending) > 2 * (os.cpu_count() or 1):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode_for_coreml(
    factor: np.float32, importance: Array | None, t: Stored, recipe: Recipe, start: int, stop: int
) -> _Encoded:
    rows = t.rows(start, stop)
    assert isinstance(rows, np.ndarray)
    x = rows * factor
    try:
        data, second = _round_for_coreml(t.name, x, recipe, importance)
    except QuantizeError as e:
        raise QuantizeError(f"{t.name}{f' times {factor:g}' if factor != 1 else ''}: {e}") from e
    return rows, data, second


def _round_for_coreml(
    name: str, x: Array, recipe: Recipe, importance: Array | None
) -> tuple[bytes, npt.NDArray[np.float16] | None]:
    if recipe.rows is not None:
        if 0 < np.abs(x).max() < 2**-20:
            raise QuantizeError(f"the weights are too small for tables in float16: use --override '{name}=8'")
        return coreml.pack(kmeans(x, bits=recipe.bits, rows=recipe.rows, importance=importance))
    if recipe.block is not None:
        return coreml.pack(with_half_scales(x, rtn(x, bits=recipe.bits, block=recipe.block)))
    if x.ndim == 1 and np.abs(x).max() < 1:
        return coreml.pack(x)  # a vector of next to nothing is that
    return coreml.pack(_half(x, "Core ML computes in float16: this model cannot be exported to it").astype(np.float32))


def _encode_rows(t: Stored, recipe: Recipe, start: int, stop: int) -> _Encoded:
    rows = t.rows(start, stop)
    assert isinstance(rows, (np.ndarray, QTensor))
    if isinstance(rows, QTensor):
        return rows.codes, rows.pack().reshape(-1).data, rows.scales
    if recipe.block is not None:
        q = rtn(rows, bits=recipe.bits, block=recipe.block)
        return rows, q.pack().reshape(-1).data, q.scales
    if recipe.bits == 16:
        try:
            half = _half(rows, f"use --override '{t.name}=32'")
        except QuantizeError as e:
            raise QuantizeError(f"{t.name}: {e}") from e
        return rows, half.reshape(-1).view(np.uint8).data, None
    return rows, rows.reshape(-1).view(np.uint8).data, None


def _half(x: npt.NDArray[Any], advice: str) -> npt.NDArray[np.float16]:
    """Numbers as float16, if it can hold them."""
    if np.abs(x).max() > np.finfo(np.float16).max:
        raise QuantizeError(f"{np.abs(x).max():g} is beyond float16: {advice}")
    half = x.astype("<f2")
    exact = x.astype(np.float64)
    if not np.square(half - exact).mean() <= 1e-6 * np.square(exact).mean():
        raise QuantizeError(f"the numbers are too small for float16, which keeps little of them: {advice}")
    return half
