"""What others call the tensors, brought to the official names.

Source: github.com/huggingface/transformers, models/rwkv/convert_rwkv_checkpoint_to_hf.py, and its forms for 5 and 6 in
        github.com/BBuf/RWKV-World-HF-Tokenizer, scripts/;
        github.com/fla-org/flash-linear-attention, utils/convert_from_rwkv7.py and layers/rwkv7.py;
        github.com/cryscan/web-rwkv, assets/scripts/convert_safetensors.py
"""

import re
from collections.abc import Sequence

from ..errors import CheckpointError
from ..files import Record

Table = Sequence[tuple[str, str]]  # pattern and replacement, applied one after the other

_WRAPPED: Table = ((r"^(_forward_module\.|module\.)+", ""),)

_TRANSFORMERS: Table = (
    (r"^rwkv7?\.", ""),
    (r"^embeddings\.", "emb."),
    (r"\.pre_ln\.", ".ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.time_mix_(k|v|r|g)(ey|alue|eceptance|ate)$", r".time_mix_\1"),
)

_FLA: Table = (
    (r"^lm_head\.", "head."),
    (r"^model\.embeddings\.", "emb."),
    (r"^model\.norm\.", "ln_out."),
    (r"^model\.layers\.", "blocks."),
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


def official(records: dict[str, Record]) -> dict[str, Record]:
    """Bring the names of whoever wrote the file to the official ones, by what names and shapes tell."""
    records = rename(records, _WRAPPED)
    if "model.layers.0.attn.r_proj.weight" in records:
        return split(rename(records, _FLA), "x_x", "x_", "rwkvag")
    if any(name.startswith(("rwkv.", "rwkv7.")) for name in records):
        return rename(records, _TRANSFORMERS)
    # what web-rwkv reads (.st) has official names but for these
    lora = next((name for name in records if name.endswith(".lora.0")), None)
    if lora:
        raise CheckpointError(f"this file is a LoRA, as web-rwkv wants it (it has {lora!r}): give the LoRA's .pth")
    if "blocks.0.att.time_mix_x" in records:
        return rename(records, _WEB_RWKV_6)
    first = records.get("blocks.0.att.time_first")
    if first and len(first.shape) == 2:  # official files call it time_faaaa when it has a value for every channel
        return rename(records, _WEB_RWKV_5)
    return records


def outputs_first(records: dict[str, Record]) -> bool:
    """Tell whether low-rank factors are stored (outputs, inputs): by web-rwkv, fla and llama.cpp, not in official files.

    The shapes tell, as long as not every rank is the width of the model, which none is.
    """
    width = records["emb.weight"].shape[-1] if "emb.weight" in records else 0
    factors = (r for name, r in records.items() if _FIRST_FACTOR.fullmatch(name))
    return any(r.shape[0] != width == r.shape[-1] for r in factors)


def rename(records: dict[str, Record], table: Table) -> dict[str, Record]:
    """Apply a table to every name.

    Raises  CheckpointError if two tensors get the same name.
    """
    renamed: dict[str, Record] = {}
    for name, record in records.items():
        new = name
        for pattern, replacement in table:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise CheckpointError(f"it has {new} under two names, of which {name} is one: give a file with one model")
        renamed[new] = record
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
