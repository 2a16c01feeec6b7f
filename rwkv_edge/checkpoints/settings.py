"""Settings beside the weights: what config.json and a GGUF's metadata say that changes a model's numbers.

A tool that writes a layout of names takes its eps from its settings by a rule of its own; `_RULES` has them.

Sources  config.json: fla-org/flash-linear-attention, fla/models/rwkv7/configuration_rwkv7.py and fla/layers/rwkv7.py;
         huggingface/transformers, models/rwkv and models/rwkv7; ml-explore/mlx-lm, mlx_lm/models/rwkv7.py;
         BBuf/RWKV-World-HF-Tokenizer, the remote code of 5 and 6
         GGUF: ggml-org/llama.cpp, src/models/rwkv6.cpp, rwkv6-base.cpp, rwkv7.cpp, rwkv7-base.cpp, conversion/rwkv.py
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import Record
from ..spec import EPS, SETTINGS, Spec

_READ, _SIZE, _SHAPES, _NOTHING = "read", "size", "shapes", "nothing"


@dataclass(frozen=True)
class _Only:
    """A setting that the step knows in one way only.

    values   what it may be
    meaning  of another value
    """

    values: tuple[Any, ...]
    meaning: str


# Every setting of the configuration classes above: read here; a size, held against the tensors; told by the tensors' shapes;
# nothing, for it changes no numbers; or refused but for the usual values. Names that are not here are passed over.
CONFIG: dict[str, str | _Only] = {
    "norm_eps": _READ,
    "layer_norm_epsilon": _READ,
    "group_norm_epsilon": _READ,
    "head_size_divisor": _READ,
    "norm_bias": _READ,
    "tie_word_embeddings": _READ,
    "hidden_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "vocab_size": _SIZE,
    "head_dim": _SIZE,
    "hidden_act": _Only(("sqrelu", "relu2"), "another activation than relu(k)^2 in the channel mix"),
    "norm_first": _Only((True,), "an embedding without a norm"),
    "embedding_layer_norm_fused": _Only((False,), "an embedding that was normed already"),
    "attn": _Only((None,), "layers of attention"),
    "use_deep_embed": _Only((False,), "vectors for every token from outside the model"),
    "wkv_has_gate": _Only((True,), "a time mix without a gate"),
    "residual_scale": _Only((None, 1), "a residual stream with a factor"),
    "embedding_scale": _Only((None, 1), "an embedding with a factor"),
    "logit_scale": _Only((None, 1), "logits with a factor"),
    "final_logit_softcapping": _Only((None, 0), "logits with a bound"),
    **dict.fromkeys(
        (
            *("num_heads", "num_attention_heads", "head_size", "attention_hidden_size", "value_dim"),
            *("intermediate_size", "hidden_ratio", "deep_embedding_size"),
            *("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "value_low_rank_dim"),
            *("time_mix_extra_dim", "time_decay_extra_dim"),
        ),
        _SHAPES,
    ),
    **dict.fromkeys(
        (
            *("rescale_every", "fuse_norm", "attn_mode", "wkv_state_dtype", "wkv_implementation", "wkv_mode", "wkv_backend"),
            *("fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp", "initializer_range", "use_cache"),
            *("context_length", "max_position_embeddings", "max_context_length", "model_version"),
            *("torch_dtype", "dtype", "transformers_version"),
        ),
        _NOTHING,
    ),
}

# The same of a GGUF, after the name of its architecture. llama.cpp's graphs have 64e-5 for the norm of the heads.
GGUF: dict[str, str | _Only] = {
    "attention.layer_norm_epsilon": _READ,
    "wkv.head_size": _READ,
    "rescale_every_n_layers": _READ,
    "attention.group_norm_epsilon": _Only((64e-5,), "a norm of the heads with another eps"),
    "token_shift_count": _Only((2,), "a channel mix that sees no token but its own"),
    "residual_scale": _Only((1,), "a residual stream with a factor"),
    "embedding_scale": _Only((1,), "an embedding with a factor"),
    "logit_scale": _Only((1,), "logits with a factor"),
    "final_logit_softcapping": _Only((0,), "logits with a bound"),
    **dict.fromkeys(
        (
            *("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
            *("time_mix_extra_dim", "time_decay_extra_dim", "attention.decay_lora_rank", "attention.iclr_lora_rank"),
            *("attention.value_residual_mix_lora_rank", "attention.gate_lora_rank", "vocab_size"),
        ),
        _SHAPES,
    ),
    **dict.fromkeys(("context_length", "attention.layer_norm_rms_epsilon"), _NOTHING),
}


@dataclass(frozen=True)
class _Rule:
    """How who writes a layout makes eps of its settings.

    heads  of the heads' norm: "channels", norm_eps times the channels of a head; "divisor", 1e-5 head_size_divisor^2;
           "fixed", 64e-5
    out    whether ln_out has norm_eps, or 1e-5 always
    """

    heads: str
    out: bool


_RULES = {
    "fla": _Rule("channels", out=True),
    "native": _Rule("channels", out=True),  # transformers' Rwkv7
    "mlx": _Rule("fixed", out=True),  # mlx-lm, which has fla's names and settings
    "transformers": _Rule("divisor", out=False),  # its Rwkv (version 4), and the remote code of 5 and 6
    "official": _Rule("divisor", out=True),
}


@dataclass(frozen=True)
class Settings:
    """What is known of a model beside its tensors.

    head_norm_eps      of the heads' norm; None where it is `norm_eps` times the channels of a head
    tied               the head is the embedding, if there is no other
    norm_bias          layer norms have biases
    source             the file that says so; None if no file does
    notes              what was decided, for who is to know
    """

    norm_eps: float = SETTINGS["norm_eps"]
    head_norm_eps: float | None = SETTINGS["head_norm_eps"]
    out_norm_eps: float = SETTINGS["out_norm_eps"]
    tied: bool = False
    norm_bias: bool = True
    source: Path | None = None
    notes: tuple[str, ...] = field(default=())

    def of(self, spec: Spec) -> Spec:
        """The spec with these settings; version 4 has no norm of heads.

        Raises  CheckpointError if the eps that a rule gives cannot be one.
        """
        heads = self.head_norm_eps
        if spec.version == "4":
            heads = SETTINGS["head_norm_eps"]
        elif heads is None:
            heads = _eps(spec.head_size * self.norm_eps, f"norm_eps times {spec.head_size} channels")
        return replace(spec, norm_eps=self.norm_eps, head_norm_eps=heads, out_norm_eps=self.out_norm_eps)


def layout_of(records: Mapping[str, Record]) -> str:
    """Tell who wrote a file by its names as they are in it, a key of `_RULES`.

    mlx-lm has fla's names, and the heads' norm by heads.
    """
    fla = next((n for n in records if n.endswith("layers.0.attn.r_proj.weight")), None)
    if fla:
        norm = records.get(fla.replace("r_proj", "g_norm"))
        return "mlx" if norm and len(norm.shape) == 2 else "fla"
    if any(re.search(r"(^|\.)rwkv7\.", n) for n in records):
        return "native"
    return "transformers" if any(n.endswith(".attention.key.weight") for n in records) else "official"


def contradiction(config: Mapping[str, Any], sizes: Mapping[str, int], version: str) -> str | None:
    """Say how config.json is of another model than the tensors, or None if it may be of theirs."""
    for key, size in sizes.items():
        if key in config and config[key] != size:
            return f"has {key} {config[key]!r}, but the tensors have {size}"
    for said in _kinds(config):
        digit = re.search(r"rwkv[-_]?v?([4-9])", said.lower())
        if digit and digit[1] != version[0]:
            return f"is of {said!r}, but the tensors are RWKV-{version[0]}'s"
    return None


def describes(config: Mapping[str, Any], sizes: Mapping[str, int], version: str) -> str | None:
    """Say why a config.json that lies beside a file is not of it, or None if it is: it must say so itself."""
    if not any("rwkv" in said.lower() for said in _kinds(config)):
        return "is not of an RWKV"
    missing = next((key for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key not in config), None)
    return f"has no {missing}" if missing else contradiction(config, sizes, version)


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """What config.json says that its model is."""
    architectures = config.get("architectures")
    kinds = [config.get("model_type"), *(architectures if isinstance(architectures, list) else [])]
    return [kind for kind in kinds if isinstance(kind, str)]


def from_config(file: Path, config: Mapping[str, Any], layout: str) -> Settings:
    """Read a config.json.

    Raises  CheckpointError, naming the setting, if it is of a wrong type or what the step cannot do.
    """
    for key, value in config.items():
        how = CONFIG.get(key)
        if isinstance(how, _Only) and not _is_one_of(value, how.values):
            raise CheckpointError(f"{file} has {key} {_short(value)}: {how.meaning}, which cannot be exported")

    def number(key: str, usual: float) -> float:
        return _eps(config[key], f"{file}: {key}") if key in config else usual

    def flag(key: str, *, usual: bool) -> bool:
        value = config.get(key, usual)
        if not isinstance(value, bool):
            raise CheckpointError(f"{file} has {key} {_short(value)}: expected true or false. Download it again")
        return value

    norm = number("norm_eps", number("layer_norm_epsilon", SETTINGS["norm_eps"]))
    if "layer_norm_epsilon" in config and number("layer_norm_epsilon", norm) != norm:
        other = config["layer_norm_epsilon"]
        raise CheckpointError(f"{file} has norm_eps {norm:g} and layer_norm_epsilon {other:g}: expected one eps")
    if layout == "official" and "norm_eps" in config:
        layout = "native"  # its model without the head has official names, and nobody else's setting is called so
    rule = _RULES[layout]
    heads: float | None = SETTINGS["head_norm_eps"]
    if "group_norm_epsilon" in config:
        heads = number("group_norm_epsilon", 0)
    elif rule.heads == "channels":
        heads = None
    elif rule.heads == "divisor" and "head_size_divisor" in config:
        divisor = config["head_size_divisor"]
        if isinstance(divisor, bool) or not isinstance(divisor, int | float) or not 1e-3 <= divisor <= 1e3:
            raise CheckpointError(f"{file} has head_size_divisor {_short(divisor)}: expected a number such as 8")
        heads = _eps(1e-5 * divisor**2, f"{file}: 1e-5 times head_size_divisor^2")
    out = norm if rule.out else SETTINGS["out_norm_eps"]
    tied, bias = flag("tie_word_embeddings", usual=False), flag("norm_bias", usual=True)
    notes = () if bias else (f"{file.name} has norm_bias false: the biases of the layer norms are zeros",)
    return Settings(norm, heads, out, tied, bias, file, notes)


def without_config(layout: str, reason: str) -> Settings:
    """What a layout's own tool takes where no config.json says it; a note for all but official names."""
    heads = None if _RULES[layout].heads == "channels" else SETTINGS["head_norm_eps"]
    note = f"{reason}: norm_eps is taken to be {SETTINGS['norm_eps']:g}"
    return Settings(head_norm_eps=heads, notes=() if layout == "official" else (note,))


def from_gguf(path: Path, about: Mapping[str, Any]) -> Settings:
    """Read a GGUF's metadata.

    Raises  CheckpointError, naming the setting, if it is of a wrong type or what the step cannot do.
    """
    arch = about["general.architecture"]
    for name, how in GGUF.items():
        key = f"{arch}.{name}"
        if isinstance(how, _Only) and key in about and not _is_one_of(about[key], how.values):
            raise CheckpointError(f"{key} is {_short(about[key])}: {how.meaning}, which cannot be exported")
    key = f"{arch}.attention.layer_norm_epsilon"
    norm = _eps(about[key], key) if key in about else SETTINGS["norm_eps"]
    return Settings(norm, out_norm_eps=norm, source=path)


def read_quantized(settings: Any) -> dict[str, float]:
    """Read the settings that our own quantized checkpoints hold.

    Raises  CheckpointError
    """
    if not isinstance(settings, dict) or settings.keys() != SETTINGS.keys():
        raise CheckpointError(f"its settings are {_short(settings)}: expected {', '.join(SETTINGS)}")
    return {name: _eps(value, name) for name, value in settings.items()}


def _eps(value: Any, where: str) -> float:
    """An eps as float32 holds it, by its shortest decimal: 1e-5 is one number, whoever wrote it.

    Raises  CheckpointError if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not EPS[0] <= value <= EPS[1]:
        raise CheckpointError(f"{where} is {_short(value)}: expected an eps, a number from {EPS[0]:g} to {EPS[1]:g}")
    return float(str(np.float32(value)))


def _is_one_of(value: Any, usual: tuple[Any, ...]) -> bool:
    """Whether a value is one of the usual; true is not 1, and numbers are compared as float32."""
    for one in usual:
        if isinstance(value, bool) == isinstance(one, bool) and isinstance(value, int | float) and isinstance(one, int | float):
            if abs(value) <= 1e30 and np.float32(value) == np.float32(one):
                return True
        elif type(value) is type(one) and value == one:
            return True
    return False


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
