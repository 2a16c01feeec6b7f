"""LoRA: what a training added to a checkpoint's matrices, as products of two thin ones; merged as the rows are read.

Sources  github.com/JL-er/RWKV-PEFT, merge/merge.py, which has it from github.com/Blealtan/RWKV-LM-LoRA;
         github.com/huggingface/peft, tuners/lora
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import Product, Record, Stored
from ..models import model_of
from . import Checkpoint, canonical, read_adapter

# other adapters, by the end of a key that gives them away
_FOREIGN = {
    r"\.init_lora_[AB]": "is the start of a PiSSA",
    r"\.lora_magnitude_vector(\.weight)?": "is a DoRA",
    r"\.lora_embedding_[AB]": "is a LoRA of the embedding table",
    r"\.bone": "is a Bone adapter",
    r"\.disha": "is a DiSHA adapter",
    r"\.lora\.[01]": "is a LoRA that was converted for web-rwkv",
    r"\.time_state": "is an initial state, which --initial-state takes and not --lora",
}
# peft's settings with which a LoRA is more than W + scale B A
_PEFT = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "alpha_pattern", "layer_replication"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")  # ways to begin that leave W as it was; pissa, olora, ... do not
# pattern and replacement, one after the other: wrappers, and what transformers and fla call the linear layers
_NAMES = (
    (r"^(base_model\.model\.|_forward_module\.|module\.|model\.|rwkv7?\.)+", ""),
    (r"^layers\.", "blocks."),
    (r"^lm_head\.", "head."),
    (r"\.(attention|attn)\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.r_proj\.", ".receptance."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.o_proj\.", ".output."),
)
_FACTOR = re.compile(r"(.+)\.lora_([AB])(\.weight)?")


def with_lora(checkpoint: Checkpoint, lora: str | Path | None) -> Checkpoint:
    """Add a LoRA to a checkpoint, W + (alpha / r) B A, as another checkpoint; reads no weights.

    lora  the file, or FILE:ALPHA where it does not say its alpha; None gives the checkpoint as it is

    Tensors that were trained whole stand in the file beside the factors: they replace the checkpoint's.

    Raises  CheckpointError if the file is no LoRA, is one of another kind, or does not fit the checkpoint.
    """
    if lora is None:
        return checkpoint
    path, given = _parse(str(lora))
    if checkpoint.quantized:
        raise CheckpointError(f"{checkpoint.path} is quantized already: merge {path} into the original checkpoint")
    if path.is_dir():
        path = path / "adapter_model.safetensors"
    settings = _settings(path)
    found = read_adapter(path)
    records = {_official(name): record for name, record in found.items()}
    if len(records) != len(found):
        raise CheckpointError(f"{path} has one tensor under two names: give a file with one LoRA")
    for name in records:
        for key, what in _FOREIGN.items():
            if re.search(f"{key}$", name):
                raise CheckpointError(f"{path} {what}: only LoRA can be merged (it has {name!r})")
    if not any(map(_FACTOR.fullmatch, records)):
        some = ", ".join(sorted(records)[:3])
        raise CheckpointError(f"{path} is no LoRA: it has no '...lora_A', but {some}")
    alpha = given or settings.get("lora_alpha")
    if alpha is None:
        raise CheckpointError(
            f"{path} does not say its alpha: give {path}:ALPHA, the lora_alpha it was trained with (a PiSSA has none, and is "
            "not supported)"
        )
    try:
        return _merged(checkpoint, path, records, alpha, rank_stabilized=bool(settings.get("use_rslora")))
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _official(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _parse(text: str) -> tuple[Path, float | None]:
    """FILE or FILE:ALPHA; a file of the whole name is that file, and so is what has no number after its last colon."""
    file, _, number = text.rpartition(":")
    if Path(text).exists() or not file:
        return Path(text), None
    try:
        alpha = float(number)
    except ValueError:
        return Path(text), None
    if not 0 < alpha < math.inf:
        raise CheckpointError(f"alpha {number} of {file} is not possible: expected a number above 0")
    return Path(file), alpha


def _settings(path: Path) -> dict[str, Any]:
    """What peft's adapter_config.json beside the file says; nothing where it is not peft's."""
    file = path.with_name("adapter_config.json")
    if not path.name.startswith("adapter_model.") or not file.exists():
        return {}
    try:
        settings = json.loads(file.read_bytes())
        kind, start, alpha = settings["peft_type"], settings.get("init_lora_weights"), settings["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{file} is damaged or not peft's: it has no peft_type and lora_alpha") from e
    if kind != "LORA":
        raise CheckpointError(f"{file} is of a {kind} adapter: only LORA can be merged")
    if isinstance(start, str) and start not in _KEEPS_BASE:
        raise CheckpointError(f"{file} has init_lora_weights {start!r}, which changed the model too: save it as a plain LoRA")
    for key in _PEFT:
        if settings.get(key):
            raise CheckpointError(f"{file} has {key} {settings[key]!r}, which is not supported: merge it with peft")
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise CheckpointError(f"{file} has lora_alpha {alpha!r}: expected a number above 0")
    return dict(settings)


def _merged(
    checkpoint: Checkpoint, path: Path, records: Mapping[str, Record], alpha: float, *, rank_stabilized: bool
) -> Checkpoint:
    model, tensors = model_of(checkpoint.spec.version), dict(checkpoint.tensors)
    factors: dict[str, dict[str, Record]] = {}
    whole: dict[str, Record] = {}
    for name, record in records.items():
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match[1], {})[match[2]] = record
        else:
            whole[name] = record
    for name, t in canonical(model, whole).items():
        _expect(checkpoint, name)
        _refuse_tables(checkpoint, name)
        if t.shape != tensors[name].shape:
            raise CheckpointError(f"{name} has shape {t.shape}, expected {tensors[name].shape}: it is another model's LoRA")
        tensors[name] = t
    ranks = set()
    for module, pair in factors.items():
        name = module if module in tensors else f"{module}.weight"
        _expect(checkpoint, name)
        _refuse_tables(checkpoint, name)
        if checkpoint.spec.weights[name].kind == "vector":
            raise CheckpointError(f"{name} is no matrix, and has a LoRA: it is another model's")
        if len(pair) != 2:
            raise CheckpointError(f"{module} has a lora_{min(pair)} and not the other factor: the file is not whole")
        a, b, shape = pair["A"], pair["B"], tensors[name].shape
        transposed = name.split(".")[-1] in model.INPUTS_FIRST
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
        tensors[name] = replace(tensors[name], plus=Product(left, right, alpha / (math.sqrt(r) if rank_stabilized else r)))
        ranks.add(r)
    note = f"{path.name}: {len(factors)} matrices of rank {', '.join(map(str, sorted(ranks)))} merged with alpha {alpha:g}"
    note += f", other tensors replaced: {len(whole)}" if whole else ""
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _expect(checkpoint: Checkpoint, name: str) -> None:
    if name not in checkpoint.tensors:
        spec = checkpoint.spec
        raise CheckpointError(
            f"{name} is no tensor of this RWKV-{spec.version} of {spec.n_layer} layers: it is another model's"
        )


def _refuse_tables(checkpoint: Checkpoint, name: str) -> None:
    """RWKV-7a's tables are computed from these, of the checkpoint as it was."""
    if checkpoint.spec.tables and name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias", *checkpoint.spec.tables):
        raise CheckpointError(f"{name} makes RWKV-{checkpoint.spec.version}'s tables, and no LoRA of it can be merged here")
