"""What people download, under canonical names: lazily, in row blocks, never whole."""

import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import Normed, Product, Record, Stored
from ..models import detect
from ..spec import SETTINGS, Shape, Spec
from .container import QUANTIZED, Held, read_file
from .hf import WEIGHTS, find_weights, join, read_settings
from .names import by_heads, official, outputs_first, tuned_state
from .settings import Settings, from_gguf, layout_of, read_quantized

__all__ = ["QUANTIZED", "Checkpoint", "ModelId", "canonical", "model_id", "open_checkpoint", "verify"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights in their file.

    tensors  canonical name -> Stored, in the order in which a step reads them
    known_id the model's id where the file states it (our own quantized checkpoints), else None
    sha256   of such a file's data
    notes    on what was read in an unusual way, left out, or merged into it, and on its settings
    metadata of a GGUF
    initial_state  the tuned state that stands among the weights, by names of a whole state: `{layer}.wkv`; or None
    """

    path: Path
    spec: Spec
    tensors: Mapping[str, Stored]
    known_id: str | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = ()
    initial_state: Mapping[str, Stored] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        return self.known_id is not None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open what people download, by what is in it and never by its name. Reads no weights.

    path  a torch zip `.pth`, `.safetensors`, web-rwkv's `.st`, `.gguf` of RWKV-6 and 7, or a Hugging Face folder

    Raises  CheckpointError if the file is missing, damaged, not RWKV, or of a version that is not supported.
    """
    path = Path(path)
    try:
        if (path / "manifest.json").exists():
            raise CheckpointError(f"{path} is a bundle: give the checkpoint that it was made from")
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        held = read_file(path)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    if QUANTIZED in held.metadata:
        return _quantized(path, held.records, held.metadata[QUANTIZED])
    return _canonical(path, held)


def _open_folder(folder: Path) -> Checkpoint:
    """Open a Hugging Face folder, or the one checkpoint in a folder."""
    files, places = find_weights(folder)
    if not places and files[0].name not in WEIGHTS:
        return open_checkpoint(files[0])
    shards = [(file, read_file(file)) for file in files]
    if not places and QUANTIZED in shards[0][1].metadata:
        return _quantized(files[0], shards[0][1].records, shards[0][1].metadata[QUANTIZED])
    records = join([(file, held.records) for file, held in shards], places)
    notes = tuple(note for _, held in shards for note in held.notes)
    return _canonical(folder, Held(records, {}, notes, half=all(held.half for _, held in shards)))


def _canonical(path: Path, held: Held) -> Checkpoint:
    """Bring names and layouts to canonical ones: no axes of one, nothing stacked, matrices as (outputs, inputs)."""
    try:
        layout = layout_of(held.records)
        records, notes = official(held.records, half=held.half)
        records, state = tuned_state(by_heads(records))
        model = detect(records)
        if "general.architecture" in held.metadata:
            settings = from_gguf(path, held.metadata)
        else:
            settings = read_settings(path, layout, _sizes(records), model.VERSIONS[0])
        if settings.tied and "head.weight" not in records and "emb.weight" in records:
            records["head.weight"] = records["emb.weight"]
        if not settings.norm_bias:
            records |= _zero_biases(records, settings)
        tensors = canonical(model, records, exchanged=outputs_first(records), norm_eps=settings.norm_eps)
        spec = settings.of(model.spec({name: t.shape for name, t in tensors.items()}))
        first = _initial_state(spec, state, half=held.half)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    notes = [*held.notes, *notes, *settings.notes]
    if spec.unusual and settings.source:
        notes.append(f"{settings.source.name} has settings that are not the usual ones: {spec.unusual_text}")
    tensors = {name: tensors[name] for name in spec.weights}
    return Checkpoint(path, spec, tensors, notes=tuple(notes), initial_state=first, metadata=held.metadata)


def _initial_state(spec: Spec, records: Mapping[str, Record], *, half: bool) -> dict[str, Stored] | None:
    """The tuned state that official tools merge into a model's file, of every layer.

    Source  github.com/JL-er/RWKV-PEFT, merge/merge_state.py
    """
    if not records:
        return None
    name = min(records)
    if half:
        raise CheckpointError(
            f"it has a tuned state ({name!r}) in a safetensors file that is float16 throughout, as web-rwkv's converters "
            "write, and they differ in whether they exchange its axes: give the .pth that it was made from"
        )
    state: dict[str, Stored] = {}
    shapes = {f"blocks.{i}.att.time_state": t.shape for i in range(spec.n_layer) for t in spec.state if t.name == "wkv"}
    if records.keys() != shapes.keys():
        odd = min(records.keys() ^ shapes.keys())
        raise CheckpointError(f"it has a tuned state for {len(records)} layers, expected {len(shapes)} ({odd!r})")
    for name, record in records.items():
        if record.shape != shapes[name]:
            raise CheckpointError(f"{name} has shape {record.shape}, expected {shapes[name]}")
        state[f"{name.split('.')[1]}.wkv"] = Stored(name, record.shape, record)
    return state


def _sizes(records: Mapping[str, Record]) -> dict[str, int]:
    """What config.json may say of the tensors, by its names."""
    if "emb.weight" not in records:
        return {}  # which is an error of its own
    V, C = (*records["emb.weight"].shape, 0)[:2]
    layers = {name.split(".")[1] for name in records if name.startswith("blocks.")}
    sizes = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": len(layers)}
    r_k = records.get("blocks.0.att.r_k")
    return sizes | ({"head_dim": r_k.shape[-1]} if r_k else {})


def _zero_biases(records: Mapping[str, Record], settings: Settings) -> dict[str, Record]:
    """The biases of layer norms that have none: zeros, that stand in no file. The norm of the heads has its own."""
    assert settings.source is not None
    biases = {}
    for name, record in records.items():
        if not re.fullmatch(r"(blocks\.\d+\.ln[012]|ln_out)\.(weight|bias)", name):
            continue
        if name.endswith(".bias"):
            raise CheckpointError(f"{settings.source} has norm_bias false, but there is a {name}: expected no such tensor")
        biases[name.removesuffix("weight") + "bias"] = Record(settings.source, 0, "F32", record.shape, factor=0.0)
    return biases


def canonical(
    model: ModuleType, records: Mapping[str, Record], *, exchanged: bool = False, norm_eps: float = SETTINGS["norm_eps"]
) -> dict[str, Stored]:
    """Give tensors by official names their canonical shapes, without those that no step reads.

    exchanged  the time mix's low-rank factors are (outputs, inputs) in the file already
    norm_eps   of the norm of the embedding, which RWKV-7a's tables contain
    """
    tensors: dict[str, Stored] = {}
    for name, record in records.items():
        last = name.split(".")[-1]
        if name in model.UNUSED:
            continue
        for part, flat in _parts(name, record, model.STACKED.get(last, "")):
            inputs_first = last in model.INPUTS_FIRST and not (exchanged and ".att." in name)
            transposed = inputs_first and len(flat.shape) == 2
            tensors[part] = Stored(part, flat.shape[::-1] if transposed else flat.shape, flat, transposed)
    for name in [n for n in tensors if n.endswith(".s_emb_x.weight")]:
        _add_embedding(tensors, name, norm_eps)
    return tensors


def _add_embedding(tensors: dict[str, Stored], name: str, norm_eps: float) -> None:
    """RWKV-7a: every table has a part that follows from the embedding, s_emb + LayerNorm(emb; ln0) s_emb_x^T."""
    x, table, norm = tensors.pop(name), name.replace("s_emb_x", "s_emb"), "blocks.0.ln0."
    try:
        normed = Normed(tensors["emb.weight"], tensors[f"{norm}weight"], tensors[f"{norm}bias"], norm_eps)
        (V, n), (_, C) = tensors[table].shape, normed.data.shape
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"{name} needs emb.weight, blocks.0.ln0 and {table}, and one of them is missing") from e
    if x.shape != (n, C) or normed.data.shape[0] != V or normed.weight.shape != (C,) or normed.bias.shape != (C,):
        raise CheckpointError(f"{name} has shape {x.shape}, expected {(n, C)} for n_embd={C} and a table of {(V, n)}")
    right = Stored(name, x.shape[::-1], x.data, transposed=True)
    tensors[table] = replace(tensors[table], plus=(Product(normed, right, 1.0),))


def _parts(name: str, record: Record, letters: str) -> list[tuple[str, Record]]:
    """A tensor without its outer axes of one; or the matrices that are stacked in it, `name.letter`."""
    shape = record.shape
    if letters and len(shape) == 3 and shape[0] == len(letters):
        return [(f"{name}.{c}", record.part(i)) for i, c in enumerate(letters)]
    if len(shape) == 3 and shape[:2] == (1, 1):
        shape = shape[2:]
    elif len(shape) == 3 and shape[1:] == (1, 1):
        shape = shape[:1]
    return [(name, replace(record, shape=shape))]


def _quantized(path: Path, records: dict[str, Record], text: str) -> Checkpoint:
    """Our own quantized checkpoint: canonical names, with `{name}.scales` beside packed codes."""
    try:
        about = json.loads(text)
        model_id, table = about["model_id"], about["tensors"]
        if type(about["format"]) is not int or about["format"] not in (1, 2):  # 2 has a tuned state too
            raise CheckpointError(f"{path} is of format {about['format']}: this release reads formats 1 and 2")
        if not re.fullmatch("[0-9a-f]{64}", model_id) or not re.fullmatch("[0-9a-f]{64}", about["sha256"]):
            raise ValueError("an id is not 64 hexadecimal digits")
        tensors = {}
        for name, t in table.items():
            shape: Shape = tuple(t["shape"])
            scales = records[f"{name}.scales"] if t["block"] else None
            tensors[name] = Stored(name, shape, records[name], False, t["bits"], t["block"], scales, t["method"])
            tensors[name].validate()
            if t["method"] not in (None, "rtn") or (t["method"] is None) != (t["block"] is None):
                raise ValueError(f"{name} was quantized by {t['method']!r}")
        spec: Spec = replace(
            detect(tensors).spec({name: t.shape for name, t in tensors.items()}), **read_quantized(about["settings"])
        )
        wrong = next((n for n, w in spec.weights.items() if w.kind == "vector" and tensors[n].bits != 32), None)
        if wrong:
            raise ValueError(f"{wrong} is a vector of {tensors[wrong].bits} bits")
        state = {name: r for name, r in records.items() if name.endswith(".att.time_state")}
        first = _initial_state(spec, state, half=False)
        if any(r.dtype != "F32" for r in state.values()):
            raise ValueError("its tuned state is not float32")
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RecursionError) as e:
        raise CheckpointError(f"{path}: its table of quantized tensors is damaged ({e!r})") from e
    tensors = {name: tensors[name] for name in spec.weights}
    return Checkpoint(path, spec, tensors, model_id, about["sha256"], initial_state=first)


def verify(checkpoint: Checkpoint) -> None:
    """Compare a quantized checkpoint's data with the sha256 it states; other checkpoints state none.

    Raises  CheckpointError if they differ.
    """
    if checkpoint.sha256 is None:
        return
    with open(checkpoint.path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        f.seek(8 + n)
        if hashlib.file_digest(f, "sha256").hexdigest() != checkpoint.sha256:
            raise CheckpointError(f"{checkpoint.path} is damaged: its sha256 is not the one it states. Quantize it again")


class ModelId:
    """The sha256 of a model, whatever its container and order: over every tensor's name, shape and float32 bytes.

    Settings that are not the usual ones are part of it.
    """

    def __init__(self, spec: Spec) -> None:
        self._settings = json.dumps(spec.unusual, sort_keys=True).encode() if spec.unusual else b""
        self._tensors: dict[str, hashlib._Hash] = {}

    def update(self, name: str, shape: Shape, rows: np.ndarray) -> None:
        """Add the next rows of a tensor."""
        if name not in self._tensors:
            self._tensors[name] = hashlib.sha256(json.dumps([name, shape]).encode())
        self._tensors[name].update(np.ascontiguousarray(rows, "<f4").data)

    def hexdigest(self) -> str:
        digests = [self._tensors[n].digest() for n in sorted(self._tensors)]
        return hashlib.sha256(b"".join([*digests, self._settings])).hexdigest()


def model_id(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """Identify the model, reading every weight once.

    Raises  CheckpointError if a weight is not finite, or a quantized checkpoint is damaged.
    """
    if checkpoint.known_id is not None:
        verify(checkpoint)
        return checkpoint.known_id
    total, done, digest = checkpoint.spec.n_parameters, 0, ModelId(checkpoint.spec)
    for name, t in checkpoint.tensors.items():
        for start in range(0, t.shape[0], t.rows_per_read):
            rows = t.rows(start, min(start + t.rows_per_read, t.shape[0]))
            assert isinstance(rows, np.ndarray)
            digest.update(name, t.shape, rows)
            done += rows.size
            if progress:
                progress(done, total)
    return digest.hexdigest()
