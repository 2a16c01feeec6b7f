"""The versions of RWKV: one file each, one table row each."""

from collections.abc import Iterable, Mapping
from types import ModuleType

from ..errors import CheckpointError
from ..spec import Shape, Spec
from . import rwkv4, rwkv5, rwkv6, rwkv7

# in the order in which their markers are looked for: a later version may have the markers of an earlier one
MODELS: tuple[ModuleType, ...] = (rwkv7, rwkv6, rwkv5, rwkv4)

# names that only one version has, in any layer
_OWN = {".att.r_k": "RWKV-7", ".att.time_maa_x": "RWKV-6", ".att.time_mix_k": "RWKV-4 or 5"}

# other files that people have, by the end of a name that gives them away
_FOREIGN = {
    "_strategy": "was converted by ChatRWKV (transposed and rescaled): use the original file",
    ".ffn.enn.weight": "is an RWKV-7b research model, which has no settled form to export",
    ".qkv.weight": "has attention layers besides RWKV's, a research model (7b, 8) without a settled form to export",
    ".rosa_qkv.weight": "is an RWKV-8 ROSA research model, which has no settled form to export",
    ".ln3.weight": "has a third norm per layer, as research models (RWKV-8 ROSA) do: they have no settled form to export",
    ".self_attn.q_proj.weight": "has attention layers: a hybrid or another architecture, and no RWKV alone",
    "optimizer_states": "is a training run's optimizer state: give the model it saved",
}
_LORA = (".lora_A", ".lora_B", ".lora_A.weight", ".lora_B.weight")


def detect(names: Iterable[str]) -> ModuleType:
    """Tell the version by tensor names, never by file name.

    Raises  CheckpointError, naming the key that decided, if no version here fits.
    """
    names = sorted(names)

    def first(*ends: str) -> str | None:
        return next((n for n in names if n.endswith(ends)), None)

    for end, what in _FOREIGN.items():
        if key := first(end):
            raise CheckpointError(f"this file {what} (it has {key!r})")
    own = [key for end in _OWN if (key := first(end))]
    if len(own) > 1:
        raise CheckpointError(f"this file has tensors of more than one version of RWKV ({own[0]!r} and {own[1]!r})")
    for model in MODELS:
        if model.MARKER in names:
            return model
    if key := first(*_LORA):
        raise CheckpointError(
            f"this file is a LoRA, not a model (it has {key!r}): give the model it was trained on, and this with --lora"
        )
    if key := first(".att.time_state"):
        raise CheckpointError(
            f"this file is an initial state, not a model (it has {key!r}): give the model, and this with --initial-state"
        )
    some = ", ".join(names[:3]) or "nothing"
    raise CheckpointError(f"this file is not an RWKV checkpoint: it has no {rwkv7.MARKER!r}, but {some}")


def model_of(version: str) -> ModuleType:
    """The model file of a version."""
    for model in MODELS:
        if version in model.VERSIONS:
            return model
    known = ", ".join(v for m in reversed(MODELS) for v in m.VERSIONS)
    raise CheckpointError(f"RWKV version {version} is unknown here: known are {known}")


def spec_of(shapes: Mapping[str, Shape]) -> Spec:
    """Detect the version by names and read its spec from canonical shapes."""
    spec: Spec = detect(shapes).spec(shapes)
    return spec
