"""The versions of RWKV: one file each, one table row each."""

from collections.abc import Iterable, Mapping
from types import ModuleType

from ..errors import CheckpointError
from ..spec import Shape, Spec
from . import rwkv7

# tried in this order; a version is known by one key that no other has
MODELS: tuple[ModuleType, ...] = (rwkv7,)

# other RWKV files that people have, by the key that gives them away
_FOREIGN = {
    "_strategy": "was converted by ChatRWKV (transposed and rescaled): use the original file",
    "blocks.0.ffn.s_emb.weight": "is an RWKV-7a (DeepEmbed), which this release cannot export",
    "blocks.0.ffn.enn.weight": "is an RWKV-7b research model, which has no settled form to export",
    "blocks.0.att.time_maa_x": "is an RWKV-6, which this release cannot export",
    "blocks.0.att.ln_x.weight": "is an RWKV-5, which this release cannot export",
    "blocks.0.att.time_mix_k": "is an RWKV-4, which this release cannot export",
    "blocks.0.att.time_state": "is an initial state, not a model",
}


def detect(names: Iterable[str]) -> ModuleType:
    """Tell the version by tensor names, never by file name.

    Raises  CheckpointError, naming the key that decided, if no version here fits.
    """
    names = set(names)
    for key in ("_strategy", "blocks.0.ffn.s_emb.weight", "blocks.0.ffn.enn.weight"):
        if key in names:
            raise CheckpointError(f"this file {_FOREIGN[key]} (it has {key!r})")
    for model in MODELS:
        if model.MARKER in names:
            return model
    for key, what in _FOREIGN.items():
        if key in names:
            raise CheckpointError(f"this file {what} (it has {key!r})")
    lora = next((n for n in sorted(names) if n.endswith((".lora_A", ".lora_B"))), None)
    if lora:
        raise CheckpointError(f"this file is a LoRA, not a model (it has {lora!r}): merge it into its model first")
    some = ", ".join(sorted(names)[:3]) or "nothing"
    raise CheckpointError(f"this file is not an RWKV checkpoint: it has no {rwkv7.MARKER!r}, but {some}")


def model_of(version: str) -> ModuleType:
    """The model file of a version."""
    for model in MODELS:
        if version == model.VERSION:
            return model
    raise CheckpointError(f"RWKV version {version} is unknown here: known are {[m.VERSION for m in MODELS]}")


def spec_of(shapes: Mapping[str, Shape]) -> Spec:
    """Detect the version by names and read its spec from canonical shapes."""
    spec: Spec = detect(shapes).spec(shapes)
    return spec
