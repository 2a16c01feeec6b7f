"""What others call the tensors, brought to the official names.

Source: github.com/huggingface/transformers, models/rwkv/convert_rwkv_checkpoint_to_hf.py, and its forms for 5 and 6 in
        github.com/BBuf/RWKV-World-HF-Tokenizer, scripts/;
        github.com/fla-org/flash-linear-attention, utils/convert_from_rwkv7.py and layers/rwkv7.py;
        github.com/ml-explore/mlx-lm, models/rwkv7.py, which has fla's names;
        github.com/Ai00-X/ai00_server, assets/scripts/convert_safetensors.py, and the same in Rust,
        github.com/cryscan/web-rwkv-converter
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..errors import CheckpointError
from ..files import Record

Table = Sequence[tuple[str, str]]  # pattern and replacement, applied one after the other

# what trainers and model classes put before a name, in any order and number; and torch between its parts
_OUTER = re.compile(r"^((_forward_module|module|model|base_model|state_dict|rwkv7?)\.)+")
_BETWEEN = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"^(\w+_)?(ema|averaged|shadow)(_\w+)?\.", re.IGNORECASE)  # a second copy of the weights

_TRANSFORMERS: Table = (
    (r"^embeddings\.", "emb."),
    (r"\.pre_ln\.", ".ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.time_mix_(k|v|r|g)(ey|alue|eceptance|ate)$", r".time_mix_\1"),
)

_FLA: Table = (
    (r"^lm_head\.", "head."),
    (r"^embeddings\.", "emb."),
    (r"^norm\.", "ln_out."),
    (r"^layers\.", "blocks."),
    (r"\.pre_norm\.", ".ln0."),
    (r"\.attn_norm\.", ".ln1."),
    (r"\.ffn_norm\.", ".ln2."),
    (r"\.attn\.", ".att."),
    (r"\.g_norm\.", ".ln_x."),
    (r"\.r_proj\.", ".receptance."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.o_proj\.", ".output."),
    (r"_lora\.lora\.0\.weight$", "1"),
    (r"_lora\.lora\.2\.weight$", "2"),
    (r"_lora\.lora\.2\.bias$", "0"),
)

_WEB_RWKV_6: Table = ((r"\.time_mix_", ".time_maa_"), (r"\.time_first$", ".time_faaaa"))
_WEB_RWKV_5: Table = ((r"\.time_first$", ".time_faaaa"),)

_FIRST_FACTOR = re.compile(r"blocks\.\d+\.att\.([wavg]1|time_maa_w1|time_decay_w1)")
_BY_HEADS = re.compile(r"blocks\.\d+\.att\.(k_k|k_a|ln_x\.weight|ln_x\.bias)")  # (H, N) in mlx-lm's conversions
_STATE = re.compile(r"blocks\.\d+\.att\.time_state")


def unwrapped(name: str) -> str:
    """A name without what trainers and model classes put around it."""
    return _OUTER.sub("", _BETWEEN.sub("", name))


def unwrap(records: Mapping[str, Record]) -> dict[str, Record]:
    """The same of every name.

    Raises  CheckpointError if two tensors get the same name.
    """
    return _renamed(records, unwrapped)


def plain(name: str) -> str:
    """The official name of one tensor, or of what an adapter adds to it, where the name alone tells."""
    name = unwrapped(name)
    for pattern, replacement in (*_TRANSFORMERS, *_FLA):
        name = re.sub(pattern, replacement, name)
    return name


def official(records: dict[str, Record], *, half: bool = False) -> tuple[dict[str, Record], list[str]]:
    """Bring the names of whoever wrote the file to the official ones, by what names, shapes and types tell.

    half  the container is safetensors and every tensor is float16, as in all that web-rwkv's converters write

    Returns  tensors by official names, and notes on what was chosen.
    """
    given = records
    records, notes = _unaveraged(unwrap(records))
    if "layers.0.attn.r_proj.weight" in records:
        return split(rename(records, _FLA), "x_x", "x_", "rwkvag"), notes
    records = rename(records, _TRANSFORMERS)
    # what web-rwkv reads (.st) has official names but for these
    lora = next((name for name in records if name.endswith(".lora.0")), None)
    if lora:
        raise CheckpointError(f"this file is a LoRA, as web-rwkv wants it (it has {lora!r}): give the LoRA's .pth")
    if "blocks.0.att.time_mix_x" in records:
        return rename(records, _WEB_RWKV_6), notes
    if half and "blocks.0.att.time_first" in given and "blocks.0.att.gate.weight" in given:
        return _web_rwkv_5(records), [*notes, _AS_IT_IS]
    return records, notes


_AS_IT_IS = (
    "att.time_first is read as it is, as web-rwkv's converter stores it: every tensor is float16. If another program wrote "
    "this file, give its .pth, whose time_first is a logarithm"
)


def _web_rwkv_5(records: dict[str, Record]) -> dict[str, Record]:
    """Take `time_first` for what web-rwkv's converters make of `time_faaaa`.

    BlinkDL's time_first is a logarithm, of every rank (RWKV-LM, RWKV-v5/src/model.py; ChatRWKV, rwkv/model.py). Nothing but
    the type tells a file of web-rwkv's: its converters change no other name or shape of RWKV-5.
    """
    if len(records["blocks.0.att.time_first"].shape) == 1:
        raise CheckpointError(
            "blocks.0.att.time_first has one number a head in a safetensors file that is float16 throughout: as BlinkDL "
            "writes it, it is a logarithm, as web-rwkv's converter writes it, it is not, and nothing tells which. "
            "Give the .pth that the file was made from"
        )
    return rename(records, _WEB_RWKV_5)


def _unaveraged(records: dict[str, Record]) -> tuple[dict[str, Record], list[str]]:
    """Leave out a moving average of the weights that stands beside them; take it if it stands alone."""
    averaged = [name for name in records if _AVERAGED.match(name)]
    if not averaged:
        return records, []
    prefix = averaged[0].split(".")[0]
    if any(name.startswith(("emb.", "embeddings.")) for name in records):
        left = {name: r for name, r in records.items() if name not in averaged}
        return left, [f"the weights without a prefix were taken; their moving average ({prefix}.) was not"]
    taken = {unwrapped(_AVERAGED.sub("", name)): r for name, r in records.items() if name in averaged}
    return taken, [f"the weights were taken from {prefix}, a moving average: the file has no others"]


def by_heads(records: dict[str, Record]) -> dict[str, Record]:
    """Give vectors that are stored with an axis for the heads their one axis."""
    return {
        name: replace(r, shape=(math.prod(r.shape),)) if _BY_HEADS.fullmatch(name) and len(r.shape) == 2 else r
        for name, r in records.items()
    }


def tuned_state(records: dict[str, Record]) -> tuple[dict[str, Record], dict[str, Record]]:
    """The weights of a model and, apart from them, the initial state that state tuning leaves among them."""
    state = {name: r for name, r in records.items() if "emb.weight" in records and _STATE.fullmatch(name)}
    return {name: r for name, r in records.items() if name not in state}, state


def outputs_first(records: dict[str, Record]) -> bool:
    """Tell whether low-rank factors are stored (outputs, inputs): by web-rwkv, fla and llama.cpp, not in official files.

    The shapes tell, as long as not every rank is the width of the model, which none is.
    """
    width = records["emb.weight"].shape[-1] if "emb.weight" in records else 0
    factors = (r for name, r in records.items() if _FIRST_FACTOR.fullmatch(name))
    return any(r.shape[0] != width == r.shape[-1] for r in factors)


def rename(records: Mapping[str, Record], table: Table) -> dict[str, Record]:
    """Apply a table to every name.

    Raises  CheckpointError if two tensors get the same name.
    """

    def new(name: str) -> str:
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        return name

    return _renamed(records, new)


def _renamed(records: Mapping[str, Record], new: Callable[[str], str]) -> dict[str, Record]:
    renamed: dict[str, Record] = {}
    for name, record in records.items():
        if new(name) in renamed:
            raise CheckpointError(f"it has {new(name)} under two names, of which {name} is one: give a file with one model")
        renamed[new(name)] = record
    return renamed


def split(records: dict[str, Record], fused: str, prefix: str, letters: str) -> dict[str, Record]:
    """Take the tensors `att.{fused}` apart, which stack one `att.{prefix}{letter}` for every letter."""
    apart: dict[str, Record] = {}
    for name, record in records.items():
        if not name.endswith(f".att.{fused}"):
            apart[name] = record
            continue
        if record.shape[0] != len(letters):
            raise CheckpointError(f"{name} has shape {record.shape}, expected {len(letters)} of each")
        apart |= {name.removesuffix(fused) + prefix + c: record.part(i) for i, c in enumerate(letters)}
    return apart
