"""The bundle: the folder that a device gets.  Format: docs/bundle.md

This is the reading side and the manifest; rwkv_edge.convert writes a bundle, rwkv_edge.runtime runs it.
"""

import contextlib
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import mil
from .errors import BundleError, CheckpointError
from .files import CODES, Pieces, Record, Stored
from .qtensor import BLOCKS
from .spec import EPS, SETTINGS, Spec, StateTensor, Weight

FORMAT = 1
MANIFEST = "manifest.json"
PACKED_STATE = "rwkv_state"  # what Core ML keeps, by its name in packages


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, its manifest read and checked for sense.

    tensors  canonical name -> Stored, where its numbers lie
    """

    path: Path
    manifest: Mapping[str, Any]
    spec: Spec
    tensors: Mapping[str, Stored | Pieces]

    @property
    def target(self) -> str:
        """What runs its graphs: "onnx" or "coreml"."""
        return next((str(g["target"]) for g in self.manifest["graphs"]), "onnx")

    @property
    def model_id(self) -> str:
        model_id: str = self.manifest["model_id"]
        return model_id

    def exact_graph(self) -> Mapping[str, Any]:
        """Give the manifest's entry of the graph in exact arithmetic: the one that runs, where that is exact itself.

        Raises  BundleError if there is none.
        """
        for graph in self.manifest["graphs"]:
            if graph["arithmetic"] == "exact":
                exact: Mapping[str, Any] = graph
                return exact
        raise BundleError(f"{self.path} has no graph in exact arithmetic: export the bundle again")

    def graph(self, role: str) -> Mapping[str, Any]:
        """Give the manifest's entry of the graph with this role.

        Raises  BundleError if there is none.
        """
        for graph in self.manifest["graphs"]:
            if graph["role"] == role:
                found: Mapping[str, Any] = graph
                return found
        roles = ", ".join(g["role"] for g in self.manifest["graphs"])
        raise BundleError(f"{self.path} has no graph for {role!r}, only for {roles}")


def read_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Read a bundle's manifest, and with `verify` every byte of its files against it.

    Raises  BundleError if there is no manifest, it is damaged or of a newer format, or a file differs from it.
    """
    path = Path(path)
    if not path.is_dir():
        if path.is_file():
            raise BundleError(f"{path} is a file, and a bundle is a folder: export the checkpoint first")
        raise BundleError(f"{path} is not there: a bundle is a folder with a {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError as e:
        raise BundleError(f"{path} has no {MANIFEST}: it is not a bundle, or its export was interrupted") from e
    except (OSError, ValueError, RecursionError) as e:
        raise BundleError(f"{path / MANIFEST} cannot be read: {e}") from e
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int or manifest["format"] < 1:
        raise BundleError(f"{path / MANIFEST} is not a bundle's manifest: it states no format")
    if manifest["format"] > FORMAT:
        raise BundleError(f"{path} is of format {manifest['format']} and this release reads format {FORMAT}: update rwkv-edge")
    try:
        json.dumps(manifest, ensure_ascii=False).encode()  # a text of half a character would fail later, and elsewhere
        _conform(manifest, _MANIFEST, "manifest")
        bundle = _parse(path, manifest)
    except (ValueError, OverflowError, CheckpointError) as e:
        raise BundleError(f"{path / MANIFEST} is damaged: {e}. Export the bundle again") from e
    if verify:
        verify_files(bundle)
    return bundle


_SHA = re.compile("[0-9a-f]{64}")
_SIZE = range(1, 1 << 40)
_PLACE = range(1 << 60)
_VALUE = {"name": str, "dtype": {"int64", "float32"}, "shape": [object]}


@dataclass(frozen=True)
class _Real:
    """A number from low to high."""

    low: float
    high: float


_FACTOR = _Real(2.0**-24, 2.0**24)
_FEATURE = {"name": re.compile("[A-Za-z_][A-Za-z0-9_]*"), "dtype": {"int32", "float16"}, "shape": [_SIZE]}
_COREML_GRAPH = {
    "file": re.compile(r"[a-z0-9-]+\.mlpackage"),
    "function": {"decode", "prefill"},
    "role": {"decode", "prefill"},
    "part": _SIZE,
    "parts": _SIZE,
    "target": {"coreml"},
    "profile": {"ane", "gpu"},
    "wkv": {"step", "half_step"},
    "T": _SIZE,
    "arithmetic": {"float16"},
    "scales": {"residual": _FACTOR, "heads": _FACTOR},
    "state": {"explicit", "packed"},
    "inputs": [_FEATURE],
    "outputs": [_FEATURE],
    "needs": {"ios": str, "macos": str},
}
_STATE = {"name": str, "shape": [_SIZE], "dtype": {"float32"}, "first": float}
_PACKED = {"name": str, "shape": [_SIZE], "first_layer": _PLACE, "rows": {...: [_PLACE]}}
_COREML_TENSOR = {
    "file": str,
    "offset": _PLACE,
    "bytes": _PLACE,
    "dtype": {"F16", "I8", "I4", "U4", "U6"},
    "shape": [_SIZE],
    "kind": {"embedding", "head", "matrix", "low_rank", "vector"},
    "bits": {4, 6, 8, 16},
    "block": (None, _SIZE),
    "rows": (None, _SIZE),
    "scales": (None, {"offset": _PLACE, "bytes": _PLACE}),
    "factor": _FACTOR,
    "method": {None, "rtn", "kmeans", "weighted kmeans"},
}
_SHARE, _LOGIT = _Real(math.ulp(0), 1), _Real(-1e4, 1e4)
_SAMPLING = {
    "temperature": _Real(0, sys.float_info.max),
    "top_k": _PLACE,
    "top_p": _SHARE,
    "min_p": _Real(0, 1),
    "typical_p": _SHARE,
    "presence_penalty": _LOGIT,
    "frequency_penalty": _LOGIT,
    "penalty_decay": _Real(0, 1),
}
_ONE_GAP = re.compile(r"(?:(?!\{\}).)*\{\}(?:(?!\{\}).)*", re.S)
_SOME = re.compile(".+", re.S)

# What a manifest looks like. A type: a value of it. A range or a set: one of its members. A _Real: a number in its bounds.
# A pattern: text that it matches. [x]: a list of x. {...: x}: any names. A dictionary: these keys, and no others. A tuple:
# one of these.
_MANIFEST: Any = {
    "format": range(1, FORMAT + 1),
    "model_id": _SHA,
    "spec": {"version": str}
    | dict.fromkeys(("n_layer", "n_embd", "n_head", "head_size", "n_ffn", "n_vocab"), _SIZE)
    | dict.fromkeys(SETTINGS, _Real(*EPS)),
    "state": [(_STATE, _STATE | {"factor": _FACTOR})],
    "graphs": [
        (
            _COREML_GRAPH,
            _COREML_GRAPH | {"packed": _PACKED},
            {
                "file": str,
                "role": {"run", "exact"},
                "target": {"onnx"},
                "profile": {"cpu"},
                "wkv": str,
                "T": _SIZE,
                "arithmetic": {"exact", "int8 activations"},
                "inputs": [(_VALUE, _VALUE | {"layout": {"key,value", "value,key"}})],
                "outputs": [(_VALUE, _VALUE | {"layout": {"key,value", "value,key"}})],
                "needs": {"onnxruntime": re.compile(r"\d+\.\d+\.\d+")},
            },
        )
    ],
    "tensors": {
        ...: (
            [_COREML_TENSOR],
            {
                "file": str,
                "offset": _PLACE,
                "bytes": _PLACE,
                "dtype": {"F32", "F16", "U8"},
                "shape": [_SIZE],
                "kind": {"embedding", "head", "matrix", "low_rank", "table", "vector"},
                "bits": {4, 8, 16, 32},
                "block": (None, set(BLOCKS)),
                "scales": (None, {"offset": _PLACE, "bytes": _PLACE}),
                "method": {None, "rtn"},
            },
        )
    },
    "files": {...: {"bytes": _PLACE, "sha256": _SHA}},
    "initial_state": (None, str),
    "tokenizer": (None, {"kind": {"json", "world"}, "file": str, "eos_token_ids": [_PLACE], "bos_token_id": _PLACE}),
    "prompt": (
        None,
        {
            "system": _ONE_GAP,
            "user": _ONE_GAP,
            "assistant": str,
            "turn_end": str,
            "stop": [_SOME],
            "blank_lines": {"keep", "collapse"},
            "think": {...: {"opening": str, "sampling": (None, _SAMPLING)}},
        },
    ),
    "sampling": _SAMPLING,
    "made_by": {"tool": str, "version": str},
}


def _conform(x: Any, form: Any, where: str) -> None:
    """Check a value against a form of `_MANIFEST`.

    Raises  ValueError, naming the place, if it does not fit.
    """
    match form:
        case dict() if ... in form and isinstance(x, dict):
            for key, value in x.items():
                _conform(value, form[...], f"{where}.{key}")
        case dict() if ... not in form and isinstance(x, dict):
            for key in sorted(form.keys() ^ x.keys(), key=str):
                raise ValueError(
                    f"{where} has no {key!r}" if key in form else f"{where} has {str(key)[:40]!r}, which is unknown"
                )
            for key, value in x.items():
                _conform(value, form[key], f"{where}.{key}")
        case [inner] if isinstance(form, list) and isinstance(x, list):
            for i, value in enumerate(x):
                _conform(value, inner, f"{where}[{i}]")
        case tuple():
            *some, closest = sorted(form, key=lambda one: _likeness(x, one))
            for one in some:
                with contextlib.suppress(ValueError):
                    return _conform(x, one, where)
            _conform(x, closest, where)
        case _Real() if isinstance(x, (int, float)) and not isinstance(x, bool) and form.low <= x <= form.high:
            pass
        case re.Pattern() if isinstance(x, str) and form.fullmatch(x):
            pass
        case range() if type(x) is int and x in form:
            pass
        case set() if type(x) in (int, str, type(None)) and x in form:
            pass
        case type() if isinstance(x, (int, float) if form is float else form) and not isinstance(x, bool):
            if form is float and not math.isfinite(float(x)):  # type: ignore[arg-type]
                raise ValueError(f"{where} is {x}")
        case None if x is None:
            pass
        case _:
            raise ValueError(f"{where} is {str(x)[:60]!r}")
    return None


def _likeness(x: Any, form: Any) -> float:
    """How much a value looks like one of its forms, for an error that speaks of the one that was meant."""
    if isinstance(x, dict) and isinstance(form, dict):
        return -len(form.keys() ^ x.keys())
    return 0 if isinstance(x, list) and isinstance(form, list) else -math.inf


def why_not_replace(path: Path) -> str | None:
    """Say why an existing folder may not be replaced by a bundle: it may if it is empty, or a bundle and nothing else."""
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir() or p.is_symlink()}
    if not names:
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        ours = {*manifest["files"], MANIFEST} if manifest["made_by"]["tool"] == "rwkv-edge" else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = None
    if ours is None:
        return "is no bundle, so it will not be replaced: choose another output"
    if names - ours:
        return f"holds {min(names - ours)!r}, which is not the bundle's, so it will not be replaced: move that away first"
    return None


def _parse(path: Path, manifest: dict[str, Any]) -> Bundle:
    for name, about in manifest["files"].items():
        parts = PurePosixPath(name).parts
        if "/".join(parts) != name or ".." in parts or name in ("", ".") or (parts[1:] and not parts[0].endswith(".mlpackage")):
            raise BundleError(f"{path / MANIFEST} names {name!r}: a bundle's files lie in its own folder")
        file = path / name
        if not file.is_file():
            raise BundleError(f"{file} is missing: export or copy the bundle again")
        if file.stat().st_size != about["bytes"]:
            raise BundleError(f"{file} has {file.stat().st_size} bytes, expected {about['bytes']}: copy the bundle again")
    used = []
    for g in manifest["graphs"]:
        used += [f"{g['file']}/{x}" for x in ("Manifest.json", mil.MODEL)] if g["target"] == "coreml" else [g["file"]]
    used += [t["file"] for one in manifest["tensors"].values() for t in (one if isinstance(one, list) else [one])]
    used += [manifest["tokenizer"]["file"]] if manifest["tokenizer"] else []
    used += [manifest["initial_state"]] if manifest["initial_state"] is not None else []
    for name in used:
        if name not in manifest["files"]:
            raise BundleError(f"{path / MANIFEST} uses {name!r} but does not list it under files")
    tensors: dict[str, Stored | Pieces] = {}
    weights = {}
    for name, one in manifest["tensors"].items():
        entries = one if isinstance(one, list) else [one]
        if not entries:
            raise BundleError(f"{path / MANIFEST} is damaged: {name} lies nowhere")
        pieces = [_stored(path, manifest["files"], name, t) for t in entries]
        tensors[name] = pieces[0] if len(pieces) == 1 else Pieces(tuple(pieces))
        weights[name] = Weight(tensors[name].shape, entries[0]["kind"])
    per_layer = tuple(
        StateTensor(t["name"].removeprefix("0."), tuple(t["shape"]), float(t["first"]))
        for t in manifest["state"]
        if t["name"].startswith("0.")
    )
    spec = Spec(**manifest["spec"], weights=weights, state=per_layer)
    bundle = Bundle(path, manifest, spec, tensors)
    _validate(bundle)
    return bundle


def _validate(bundle: Bundle) -> None:
    """Check that sizes, state and graphs fit each other: what the runtime allocates follows from them."""
    spec, manifest, where = bundle.spec, bundle.manifest, bundle.path / MANIFEST
    if not manifest["graphs"]:
        raise BundleError(f"{where} is damaged: it has no graphs")
    if (
        "emb.weight" not in bundle.tensors
        or bundle.tensors["emb.weight"].shape != (spec.n_vocab, spec.n_embd)
        or spec.n_head * spec.head_size != spec.n_embd
    ):
        raise BundleError(f"{where} is damaged: its sizes {spec.sizes} are not those of its tensors")
    if not spec.state or len(manifest["state"]) != spec.n_layer * len(spec.state):
        raise BundleError(f"{where} is damaged: its state does not fit {spec.n_layer} layers")
    if [(t["name"], tuple(t["shape"])) for t in manifest["state"]] != [(n, t.shape) for n, t in spec.state_tensors.items()]:
        raise BundleError(f"{where} is damaged: its state is not the same in every layer")
    if any(t.shape not in ((spec.n_embd,), (spec.n_head, *2 * [spec.head_size])) for t in spec.state):
        raise BundleError(f"{where} is damaged: its state does not fit n_embd={spec.n_embd}")
    about, prompt = manifest["tokenizer"], manifest["prompt"]
    for i in [*about["eos_token_ids"], about["bos_token_id"]] if about else []:
        if i >= spec.n_vocab:
            raise BundleError(f"{where} is damaged: token {i} ends or begins a text, and there are {spec.n_vocab}")
    if prompt and "none" not in prompt["think"]:
        raise BundleError(f"{where} is damaged: its chat template has no way of thinking called 'none'")
    tables = {bundle.tensors[name].shape for name in spec.tables}
    if any(len(shape) != 2 or shape[0] != spec.n_vocab or len(tables) > 1 for shape in tables):
        raise BundleError(f"{where} is damaged: its tables are not of {spec.n_vocab} rows of one width")
    if bundle.target == "coreml":
        _validate_coreml(bundle)
        return
    sizes = {f"state.{n}": math.prod(t.shape) for n, t in spec.state_tensors.items()}
    for graph in manifest["graphs"]:
        states = [i for i in graph["inputs"] if i["name"].startswith("state.")]
        others = [i["name"] for i in graph["inputs"] if i not in states]
        if others != ["tokens", "positions", *(["deep_embed"] if spec.tables else [])]:
            raise BundleError(f"{where} is damaged: {graph['file']} takes {', '.join(others)}")
        embed = [i["shape"][1:] for i in graph["inputs"] if i["name"] == "deep_embed"]
        if embed != [[len(spec.tables), shape[1]] for shape in tables]:
            raise BundleError(f"{where} is damaged: the tables are not what {graph['file']} takes")
        if any(type(n) is not int or n < 1 for i in states for n in i["shape"]):
            raise BundleError(f"{where} is damaged: a state of {graph['file']} has no size")
        if {i["name"]: math.prod(i["shape"]) for i in states} != sizes:
            raise BundleError(f"{where} is damaged: the inputs of {graph['file']} are not the state")
        if any(("layout" in i) != (len(i["shape"]) == 4) for i in states):
            raise BundleError(f"{where} is damaged: {graph['file']} does not say how its memory lies")


def _validate_coreml(bundle: Bundle) -> None:
    """Check that the parts are all there, in order, and pass on what the next one takes."""
    where, graphs = bundle.path / MANIFEST, bundle.manifest["graphs"]
    if any("factor" not in t for t in bundle.manifest["state"]):
        raise BundleError(f"{where} is damaged: it does not say how its graphs hold the state")
    sizes = {f"state_{n.replace('.', '_')}": math.prod(t.shape) for n, t in bundle.spec.state_tensors.items()}
    for role in ("decode", "prefill"):
        parts = [g for g in graphs if g["role"] == role]
        if [(g["part"], g["parts"]) for g in parts] != [(i + 1, len(parts)) for i in range(len(parts))] or not parts:
            raise BundleError(f"{where} is damaged: the parts of {role} are not all there, in order")
        T, known, found = parts[0]["T"], {"tokens", "deep_embed"}, 0
        for g in parts:
            takes = {i["name"]: math.prod(i["shape"]) for i in g["inputs"]}
            gives = {o["name"] for o in g["outputs"]}
            states = {n: size for n, size in takes.items() if n.startswith("state_")}
            if g["function"] != role or (T == 1) != (role == "decode") or takes.get("tokens", T) != T:
                raise BundleError(f"{where} is damaged: {g['file']} is not a {role} of {T} tokens")
            if "packed" in g and not _is_packing(bundle.spec, g["packed"]):
                raise BundleError(f"{where} is damaged: it does not say how {g['file']} packs its state")
            if (g["T"], g["state"]) != (T, parts[0]["state"]) or ("packed" in g and g["state"] != "packed"):
                raise BundleError(f"{where} is damaged: the parts of {role} are not of one kind")
            if not takes.keys() - states.keys() <= known or any(sizes.get(n) != size for n, size in states.items()):
                raise BundleError(f"{where} is damaged: {g['file']} takes what nothing gives")
            if any(f"{n}_out" not in gives for n in states):
                raise BundleError(f"{where} is damaged: {g['file']} does not give its state")
            known |= {n.removesuffix("_out") for n in gives if n.endswith("_out")}
            found += len(states) if g["state"] == "explicit" else math.prod(g["packed"]["shape"]) if "packed" in g else 0
        if found != (len(sizes) if parts[0]["state"] == "explicit" else sum(sizes.values())):
            raise BundleError(f"{where} is damaged: the state of {role} is not the model's")
        if [o["shape"] for o in parts[-1]["outputs"] if o["name"] == "logits"] != [[1, bundle.spec.n_vocab]]:
            raise BundleError(f"{where} is damaged: the last part of {role} gives no logits of {bundle.spec.n_vocab} tokens")


def packing(spec: Spec, first: int, stop: int) -> dict[str, Any]:
    """How the state of some layers lies in one tensor (layers, rows, width): which rows of a layer are which tensor."""
    width = spec.head_size if spec.head_size > 1 else spec.n_embd
    rows, at = {}, 0
    for t in spec.state:
        n = math.prod(t.shape) // width
        rows[t.name] = [at, at + n]
        at += n
    return {"name": PACKED_STATE, "shape": [stop - first, at, width], "first_layer": first, "rows": rows}


def _is_packing(spec: Spec, said: Mapping[str, Any]) -> bool:
    first = said["first_layer"]
    return said["shape"][0] + first <= spec.n_layer and said == packing(spec, first, first + said["shape"][0])


def _stored(path: Path, files: Mapping[str, Any], name: str, t: Mapping[str, Any]) -> Stored:
    shape, bits, block = tuple(t["shape"]), t["bits"], t["block"]
    if block and (len(shape) != 2 or not t["scales"]):
        raise BundleError(
            f"{path / MANIFEST} is damaged: {name} of shape {shape} is in blocks, which takes a matrix and scales"
        )
    if "factor" in t:
        return _stored_for_coreml(path, files, name, t)
    n_blocks = -(-shape[1] // block) if block else 0
    packed = (shape[0], n_blocks, block * bits // 8) if block else shape
    data = Record(path / t["file"], t["offset"], t["dtype"], packed)
    scales = Record(path / t["file"], t["scales"]["offset"], "F32", (shape[0], n_blocks)) if block else None
    stored = Stored(name, shape, data, bits=bits, block=block, scales=scales, method=t["method"])
    return _inside(path, files, t, stored)


def _inside(path: Path, files: Mapping[str, Any], t: Mapping[str, Any], stored: Stored) -> Stored:
    stored.validate()
    for record in (stored.data, *([stored.scales] if stored.scales else [])):
        if record.offset < 0 or record.offset + record.nbytes > files[t["file"]]["bytes"]:
            raise BundleError(f"{path / MANIFEST} places {stored.name} outside {t['file']}")
    return stored


def _stored_for_coreml(path: Path, files: Mapping[str, Any], name: str, t: Mapping[str, Any]) -> Stored:
    """Some rows of a weight in a package's file: float16, or codes with scales or tables of float16."""
    shape, file, bits, block, rows = tuple(t["shape"]), path / t["file"], t["bits"], t["block"], t["rows"]
    packing = CODES.get(t["dtype"])
    if (block or rows) and (len(shape) != 2 or not t["scales"] or (packing and shape[1] % packing.n_weights)):
        raise BundleError(f"{path / MANIFEST} is damaged: {name} of shape {shape} does not go with {t['dtype']}")
    factor = float(t["factor"])
    coded = bool(block or rows)
    data = Record(file, t["offset"], t["dtype"], shape, packing=packing, factor=1.0 if coded else factor)
    second = (shape[0] // rows, 2**bits) if rows else (shape[0], shape[1] // block) if block else ()
    scales = Record(file, t["scales"]["offset"], "F16", second, factor=factor) if coded else None
    stored = Stored(name, shape, data, bits=bits, block=block, scales=scales, method=t["method"], rows_per_table=rows)
    return _inside(path, files, t, stored)


def tensor_entry(stored: Stored, kind: str) -> dict[str, Any]:
    """A tensor's entry in the manifest."""
    return {
        "file": stored.data.path.name,
        "offset": stored.data.offset,
        "bytes": stored.data.nbytes,
        "dtype": stored.data.dtype,
        "shape": list(stored.shape),
        "kind": kind,
        "bits": stored.bits,
        "block": stored.block,
        "scales": {"offset": stored.scales.offset, "bytes": stored.scales.nbytes} if stored.scales else None,
        "method": stored.method,
    }


def coreml_tensor_entry(t: Stored, file: str, kind: str, factor: float) -> dict[str, Any]:
    """The same of some rows of a tensor in a package, whose numbers are multiplied by `factor` when they are read."""
    entry = tensor_entry(t, kind)
    return {k: file if k == "file" else v for k, v in entry.items() if k != "method"} | {
        "rows": t.rows_per_table,
        "factor": factor,
        "method": t.method,
    }


def verify_files(bundle: Bundle) -> None:
    """Compare every file's sha256 with the manifest.

    Raises  BundleError, naming the first file that differs.
    """
    for name, about in bundle.manifest["files"].items():
        if sha256_of(bundle.path / name) != about["sha256"]:
            raise BundleError(f"{bundle.path / name} is damaged: its sha256 is not the manifest's. Copy the bundle again")


def sha256_of(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    try:
        with open(file, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise BundleError(f"cannot read {file}: {e.strerror}") from e


def dump_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: the same for the same content."""
    return (json.dumps(manifest, indent=1, ensure_ascii=True) + "\n").encode()
