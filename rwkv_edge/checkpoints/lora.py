"""Adapters: what a training added to a checkpoint's matrices, merged as the rows are read.

    LoRA          W + (alpha / r) B A
    PiSSA         W - B0 A0 + B A, with the factors that training began from in a file of their own; no alpha
    MiSS, which was called DiSHA and Bone before: the matrix D (r, O) is added to every r inputs, W[o, j] + D[j mod r, o]
    Bat           of the same family: W + W_b D_b + D_b for every block W_b of r outputs and r inputs

Sources  github.com/JL-er/RWKV-PEFT, merge/merge_lora.py, merge_pissa.py, merge_disha.py, merge_bone.py and rwkvt/peft/;
         github.com/Blealtan/RWKV-LM-LoRA; github.com/huggingface/peft, tuners/lora, tuners/bone, tuners/miss;
         github.com/JL-er/Bone, README, for the blocks along the outputs
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..files import Delta, Product, Record, Stored, exact_product
from ..models import model_of
from ..qtensor import Array
from . import Checkpoint, canonical
from .container import Held, read_file
from .names import plain

# other adapters, by the end of a key that gives them away
_FOREIGN = {
    r"\.init_lora_[AB]": "is the start of a PiSSA",
    r"\.lora_(magnitude_vector(\.weight)?|M)": "is a DoRA",
    r"\.lora_embedding_[AB]": "is a LoRA of the embedding table",
    r"\.lora\.[01]": "is a LoRA that was converted for web-rwkv",
    r"\.lora_[ab]": "is a LoRA of mlx-lm",
    r"\.time_state": "is an initial state, which --initial-state takes and not --lora",
}
# peft's settings with which a LoRA is more than W + scale B A
_PEFT = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "alpha_pattern", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
_PEFT_TYPES = ("LORA", "BONE", "MISS")
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")  # ways to begin that leave W as it was; pissa, olora, ... do not
_FACTOR = re.compile(r"(.+)\.lora_([AB])(\.weight)?")
_SHARDS = re.compile(r"(.+)\.((bone|disha|miss)(_block)?)(\.weight)?")
_CALLED = {"bone": "Bone", "disha": "DiSHA", "miss": "MiSS"}
_STARTS = ("init_pissa.pth", "init_lora.pth")  # what RWKV-PEFT calls a PiSSA's start, beside the adapter


@dataclass(frozen=True)
class _Given:
    """What --lora says: the file, and its alpha or the file that a PiSSA began from."""

    path: Path
    alpha: float | None = None
    start: Path | None = None


def with_lora(checkpoint: Checkpoint, lora: str | Path | None) -> Checkpoint:
    """Add an adapter to a checkpoint, as another checkpoint; reads no weights of the checkpoint.

    lora  the file, FILE:ALPHA where a LoRA does not say its alpha, or FILE:START for a PiSSA whose start is not beside it;
          None gives the checkpoint as it is

    Tensors that were trained whole stand in the file beside the adapter's: they replace the checkpoint's.

    Raises  CheckpointError if the file is no adapter, is one of another kind, or does not fit the checkpoint.
    """
    if lora is None:
        return checkpoint
    given = _parse(str(lora))
    if checkpoint.quantized:
        raise CheckpointError(f"{checkpoint.path} is quantized already: merge {given.path} into the original checkpoint")
    if given.path.is_dir():
        files = [given.path / f"adapter_model.{end}" for end in ("safetensors", "bin")]
        given = replace(given, path=next((file for file in files if file.exists()), files[0]))
    path, settings = given.path, _settings(given.path)
    held = read_file(path)
    records = _named(path, held)
    modules = [name for name in records if _SHARDS.fullmatch(name)]
    is_lora = any(map(_FACTOR.fullmatch, records))
    if modules and is_lora:
        raise CheckpointError(
            f"{path} is a {_kind(modules[0])} adapter (it has {modules[0]!r}), and a LoRA too: give one alone"
        )
    if not modules and not is_lora:
        some = ", ".join(sorted(records)[:3])
        raise CheckpointError(f"{path} is no LoRA: it has no '...lora_A', but {some}")
    try:
        merged = _Merge(checkpoint, path, records)
        note = merged.shards() if modules else _merge_lora(merged, given, settings)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    unused = " Alpha is not used" if given.alpha is not None and "alpha" not in note else ""
    note += f", other tensors replaced: {merged.n_whole}" if merged.n_whole else ""
    notes = (*checkpoint.notes, *held.notes, f"{path.name}: {note}{'.' + unused if unused else ''}")
    return replace(checkpoint, tensors=merged.tensors, notes=notes)


def _named(path: Path, held: Held) -> dict[str, Record]:
    """Tensors by official names; refuses kinds of adapters that cannot be merged."""
    records = {plain(name): record for name, record in held.records.items()}
    if len(records) != len(held.records):
        raise CheckpointError(f"{path} has one tensor under two names: give a file with one LoRA")
    for name in records:
        for key, what in _FOREIGN.items():
            if re.search(f"{key}$", name):
                raise CheckpointError(f"{path} {what}: only LoRA can be merged (it has {name!r})")
    return records


def _kind(name: str) -> str:
    """What a tensor of the MiSS family is called."""
    match = _SHARDS.fullmatch(name)
    return _CALLED[match[3]] if match else "LoRA"


def _parse(text: str) -> _Given:
    """FILE, FILE:ALPHA or FILE:START; a file of the whole name is that file, and so is what has neither after a colon."""
    file, _, last = text.rpartition(":")
    if Path(text).exists() or not file:
        return _Given(Path(text))
    try:
        alpha = float(last)
    except ValueError:
        return _Given(Path(file), start=Path(last)) if Path(file).exists() and Path(last).exists() else _Given(Path(text))
    if not 0 < alpha < math.inf:
        raise CheckpointError(f"alpha {last} of {file} is not possible: expected a number above 0")
    return _Given(Path(file), alpha)


def _settings(path: Path) -> dict[str, Any]:
    """What peft's adapter_config.json beside the file says; nothing where it is not peft's."""
    file = path.with_name("adapter_config.json")
    if not path.name.startswith("adapter_model.") or not file.exists():
        return {}
    try:
        settings = json.loads(file.read_bytes())
        kind, start = settings["peft_type"], settings.get("init_lora_weights")
        alpha = settings["lora_alpha"] if kind == "LORA" else 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{file} is damaged or not peft's: it has no peft_type and lora_alpha") from e
    if kind not in _PEFT_TYPES:
        raise CheckpointError(f"{file} is of a {kind} adapter: only {', '.join(_PEFT_TYPES)} can be merged")
    if isinstance(start, str) and start not in _KEEPS_BASE:
        raise CheckpointError(f"{file} has init_lora_weights {start!r}, which changed the model too: save it as a plain LoRA")
    for key in _PEFT:
        if settings.get(key):
            raise CheckpointError(f"{file} has {key} {settings[key]!r}, which is not supported: merge it with peft")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise CheckpointError(f"{file} has lora_alpha {alpha!r}: expected a number above 0")
    return dict(settings)


# --- the merge ---


class _Merge:
    """A checkpoint's tensors, to which those of an adapter are added."""

    def __init__(self, checkpoint: Checkpoint, path: Path, records: Mapping[str, Record]) -> None:
        self.checkpoint, self.path = checkpoint, path
        self.model, self.tensors = model_of(checkpoint.spec.version), dict(checkpoint.tensors)
        self.pairs: dict[str, dict[str, Record]] = {}
        self.parts: dict[str, tuple[str, Record]] = {}
        whole: dict[str, Record] = {}
        for name, record in records.items():
            if match := _FACTOR.fullmatch(name):
                self.pairs.setdefault(match[1], {})[match[2]] = record
            elif match := _SHARDS.fullmatch(name):
                self.parts[match[1]] = match[2], record
            else:
                whole[name] = record
        self.n_whole = len(whole)
        for name, t in canonical(self.model, whole).items():
            self._expect(name)
            if t.shape != self.tensors[name].shape:
                expected = self.tensors[name].shape
                raise CheckpointError(f"{name} has shape {t.shape}, expected {expected}: it is another model's LoRA")
            self.tensors[name] = t

    def product(self, module: str, pair: Mapping[str, Record], scale: float | None, alpha: float = 1.0) -> int:
        """Add scale B A to a matrix, or alpha / r B A without a scale; gives r."""
        name = self._matrix(module)
        if len(pair) != 2:
            raise CheckpointError(f"{module} has a lora_{min(pair)} and not the other factor: the file is not whole")
        a, b, shape = pair["A"], pair["B"], self.tensors[name].shape
        transposed = name.split(".")[-1] in self.model.INPUTS_FIRST
        n_out, n_in = shape[::-1] if transposed else shape
        r = (*a.shape, 0)[0]
        if a.shape != (r, n_in) or b.shape != (n_out, r):
            raise CheckpointError(
                f"{module} has lora_A {a.shape} and lora_B {b.shape}, expected (r, {n_in}) and ({n_out}, r): "
                "it is another model's LoRA"
            )
        left, right = (Stored(f"{module}.lora_B", b.shape, b), Stored(f"{module}.lora_A", a.shape, a))
        if transposed:  # the file has (B A)^T = A^T B^T
            left, right = (Stored(t.name, t.shape[::-1], t.data, True) for t in (right, left))
        self._add(name, Product(left, right, alpha / r if scale is None else scale))
        return r

    def shards(self) -> str:
        """Add what MiSS and its forerunners trained; gives a note."""
        along = _blocks_along(self)
        kinds, ranks = set(), set()
        for module, (key, record) in self.parts.items():
            name, shape = self._matrix(module), record.shape
            if name.split(".")[-1] in self.model.INPUTS_FIRST:
                raise CheckpointError(f"{name} is not of a linear layer, and has a {key}: it is another model's")
            n_out, n_in = self.tensors[name].shape
            n_side, r = n_out if along == "outputs" else n_in, shape[1] if len(shape) == 3 else 0
            stored = Stored(f"{module}.{key}", shape, record)
            in_full = len(shape) == 2 and (shape[1] == n_out or (key == "miss_block" and n_out % shape[1] == 0))
            if in_full and shape[0] <= n_in:
                self._add(name, Shards(stored))
            elif r and shape == (n_side // r, r, r) and n_out % r == n_in % r == 0:
                self._add(name, Blocks(stored, along))
            else:
                raise CheckpointError(
                    f"{module} has {key} {shape}, expected (r, {n_out}) or ({n_side} / r, r, r): it is another model's, or of "
                    "an early form that is not supported"
                )
            kinds.add(_kind(f"{module}.{key}") + (" of blocks" if r else ""))
            ranks.add(shape[-2])
        return f"{' and '.join(sorted(kinds))}, {len(self.parts)} matrices of rank {_listed(ranks)} merged"

    def _add(self, name: str, delta: Delta) -> None:
        self.tensors[name] = replace(self.tensors[name], plus=(*self.tensors[name].plus, delta))

    def _matrix(self, module: str) -> str:
        """The name of the matrix that a part of an adapter belongs to."""
        name = module if module in self.tensors else f"{module}.weight"
        self._expect(name)
        if self.checkpoint.spec.weights[name].kind == "vector":
            raise CheckpointError(f"{name} is no matrix, and has a LoRA: it is another model's")
        return name

    def _expect(self, name: str) -> None:
        spec = self.checkpoint.spec
        if name not in self.checkpoint.tensors:
            raise CheckpointError(
                f"{name} is no tensor of this RWKV-{spec.version} of {spec.n_layer} layers: it is another model's"
            )
        # RWKV-7a's tables are computed from these, of the checkpoint as it was
        if spec.tables and name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias", *spec.tables):
            raise CheckpointError(f"{name} makes RWKV-{spec.version}'s tables, and no LoRA of it can be merged here")


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


# --- LoRA and PiSSA ---


def _merge_lora(merge: _Merge, given: _Given, settings: Mapping[str, Any]) -> str:
    """Add the products of a LoRA, or of a PiSSA; gives a note."""
    beside = [] if settings else [merge.path.with_name(name) for name in _STARTS]
    start = given.start or next((file for file in beside if file.exists()), None)
    if start is not None:
        return _merge_pissa(merge, start)
    if not settings and (sign := _sign_of_pissa(merge)):
        raise CheckpointError(
            f"this seems to be a PiSSA ({sign}), which changed the model's own weights too: give FILE:START, with the "
            f"{_STARTS[0]} that RWKV-PEFT wrote when the training began"
        )
    alpha = given.alpha or settings.get("lora_alpha")
    if alpha is None:
        raise CheckpointError(
            f"{merge.path} does not say its alpha: give {merge.path}:ALPHA, the lora_alpha it was trained with (a PiSSA has "
            f"none: give {merge.path}:START, with the {_STARTS[0]} that it began from)"
        )
    ranks = set()
    for module, pair in merge.pairs.items():
        r = (*pair["A"].shape, 0)[0] if "A" in pair else 0
        scale = alpha / math.sqrt(r) if settings.get("use_rslora") and r else None
        ranks.add(merge.product(module, pair, scale, alpha))
    return f"{len(merge.pairs)} matrices of rank {_listed(ranks)} merged with alpha {alpha:g}"


def _merge_pissa(merge: _Merge, start: Path) -> str:
    """W - B0 A0 + B A."""
    began: dict[str, dict[str, Record]] = {}
    for name, record in read_file(start).records.items():
        if match := re.fullmatch(r"(.+)\.init_lora_([AB])", plain(name)):
            began.setdefault(match[1], {})[match[2]] = record
    ranks = set()
    for module, pair in merge.pairs.items():
        first = began.get(module, {})
        if {k: r.shape for k, r in first.items()} != {k: r.shape for k, r in pair.items()}:
            raise CheckpointError(
                f"{start} is not what this PiSSA began from: it has no init_lora_A and init_lora_B of {module} with the same "
                f"shapes. Give the right one as FILE:START, or move {start.name} away if this is a plain LoRA"
            )
        ranks.add(merge.product(module, pair, 1.0))
        merge.product(module, first, -1.0)
    return f"PiSSA, {len(merge.pairs)} matrices of rank {_listed(ranks)} merged, begun from {start.name}"


def _sign_of_pissa(merge: _Merge) -> str | None:
    """Tell a PiSSA whose start is missing by its name, or by its factors.

    It begins from a singular value decomposition: column k of B is as long as row k of A, as the singular value says, and
    training keeps that nearly. A LoRA begins from B = 0 and rows of one length.
    """
    if "pissa" in merge.path.name.lower():
        return "by its name"
    lengths: list[tuple[float, float]] = []
    for pair in merge.pairs.values():
        if len(pair) == 2 and all(len(r.shape) == 2 for r in pair.values()) and pair["A"].shape[0] == pair["B"].shape[1]:
            A, B = (pair[k].rows(0, pair[k].shape[0]).astype(np.float64) for k in "AB")
            lengths += zip(np.square(A).sum(1), np.square(B).sum(0), strict=True)
    known = np.array([pair for pair in lengths if min(pair) > 0 and max(pair) < math.inf])
    if len(known) < 12:
        return None
    a, b = np.log(known.T)
    if np.abs(a - b).mean() > 0.1 or min(a.std(), b.std()) < 1e-3 or np.corrcoef(a, b)[0, 1] < 0.8:
        return None
    return "its factors are as long as each other, as a PiSSA's are"


# --- MiSS and its forerunners ---


@dataclass(frozen=True)
class Shards:
    """W[o, j] + D[j mod r, o mod m], of D (r, m): MiSS, and its "mini" form where m is less than the outputs."""

    data: Stored

    @property
    def path(self) -> Path:
        return self.data.data.path

    doubt = "is the file damaged?"

    def of(self, x: Array, start: int) -> npt.NDArray[np.float64]:
        D = np.asarray(self.data.read(), np.float64)
        (r, m), (n_rows, n_in) = D.shape, x.shape
        return D.T[np.ix_(np.arange(start, start + n_rows) % m, np.arange(n_in) % r)]


@dataclass(frozen=True)
class Blocks:
    """W_b D_b + D_b for every block W_b of r outputs and r inputs, of D (n, r, r): one D_b for the blocks of the same inputs,
    or outputs."""

    data: Stored
    along: str

    @property
    def path(self) -> Path:
        return self.data.data.path

    doubt = "is the file damaged?"

    def of(self, x: Array, start: int) -> npt.NDArray[np.float64]:
        D = self.data.read()
        assert isinstance(D, np.ndarray)
        r, rows = D.shape[-1], np.arange(start, start + len(x))
        W = x.reshape(len(x), -1, r).swapaxes(0, 1)  # (blocks of inputs, rows, r)
        if self.along == "inputs":
            added = exact_product(W, D) + D[:, rows % r]
        else:
            added = np.empty(W.shape, np.float64)
            for block in np.unique(rows // r):
                here = rows // r == block
                added[:, here] = exact_product(W[:, here], D[block]) + D[block, rows[here] % r]
        return added.swapaxes(0, 1).reshape(x.shape)


def _blocks_along(merge: _Merge) -> str:
    """Tell whether blocks have a D for the same inputs or the same outputs.

    peft's are along the outputs, RWKV-PEFT's DiSHA along the inputs, its Bone along the outputs at first and the inputs later:
    a matrix that is not square tells.
    """
    keys = {key for key, _ in merge.parts.values()}
    if keys & {"bone_block", "miss_block"}:
        return "outputs"
    sides = set()
    for module, (key, record) in merge.parts.items():
        name = f"{module}.weight"
        if key == "disha" or len(record.shape) != 3 or name not in merge.tensors or len(merge.tensors[name].shape) != 2:
            continue
        n_out, n_in = merge.tensors[name].shape
        if n_out != n_in:
            sides.add("inputs" if record.shape[0] * record.shape[1] == n_in else "outputs")
    if len(sides) == 1:
        return sides.pop()
    if keys == {"bone"} and any(len(record.shape) == 3 for _, record in merge.parts.values()):
        raise CheckpointError(
            "it is a Bone adapter of blocks, along the outputs or the inputs, and no matrix of it tells which: merge it with "
            "the merge_bone.py of the RWKV-PEFT that wrote it"
        )
    return "inputs"
