"""Which tensor gets how many bits: data, made before any weight is read."""

import fnmatch
import math
from collections.abc import Sequence

from ..errors import QuantizeError
from ..qtensor import BLOCKS, Recipe
from ..spec import Kind, Shape, Spec

# bits by kind; vectors are always float32: rounding them is catastrophic, and they are few
QUANTS: dict[str, dict[Kind, int]] = {
    "none": {"embedding": 32, "head": 32, "matrix": 32, "low_rank": 32, "table": 32},
    "fp16": {"embedding": 16, "head": 16, "matrix": 16, "low_rank": 16, "table": 16},
    "int8": {"embedding": 8, "head": 8, "matrix": 8, "low_rank": 8, "table": 8},
    "int4": {"embedding": 8, "head": 4, "matrix": 4, "low_rank": 8, "table": 8},
}


def plan(spec: Spec, quant: str, *, block: int | None = None, overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """Decide the recipe of every tensor.

    quant      "none", "fp16", "int8" or "int4"
    block      weights that share one scale, None for 32; a matrix with fewer inputs, or an uneven number, gets a smaller one
    overrides  "PATTERN=BITS" or "PATTERN=BITS:BLOCK" with BITS 4, 8, 16 or 32; the last that matches a name decides

    Raises  QuantizeError if one of these is not known, matches no tensor, or does not fit a tensor.
    """
    if quant in ("lut4", "lut6"):
        raise QuantizeError(f"quant {quant} is for Core ML: give target coreml with it, or one of {', '.join(QUANTS)}")
    if quant not in QUANTS:
        raise QuantizeError(f"quant {quant!r} is unknown: expected one of {', '.join(QUANTS)}")
    if block is not None and quant in ("none", "fp16") and not overrides:
        raise QuantizeError(f"block {block} says nothing with quant {quant}: blocks go with int8 and int4")
    block = 32 if block is None else block
    if block not in BLOCKS:
        raise QuantizeError(f"block {block} is not possible: expected one of {', '.join(map(str, BLOCKS))}")
    chosen = {name: (QUANTS[quant].get(w.kind, 32), block) for name, w in spec.weights.items()}
    for override in overrides:
        pattern, bits, own_block = _parse(override)
        names = [n for n in fnmatch.filter(spec.weights, pattern) if spec.weights[n].kind != "vector"]
        if not names:
            raise QuantizeError(f"override {override!r} matches no matrix: inspect lists their names")
        chosen |= dict.fromkeys(names, (bits, own_block or block))
    return {name: _recipe(name, spec.weights[name].shape, spec.weights[name].kind, *pair) for name, pair in chosen.items()}


def _recipe(name: str, shape: Shape, kind: Kind, bits: int, block: int) -> Recipe:
    if bits in (16, 32):
        return Recipe(bits)
    while block > BLOCKS[0] and shape[1] % block:
        block //= 2
    if kind == "embedding" and (bits != 8 or shape[1] % block):
        raise QuantizeError(
            f"{name} has rows of {shape[1]} and would get {bits} bits: the embedding takes 8 bits and rows that are a "
            f"multiple of 16; give --override '{name}=16'"
        )
    return Recipe(bits, block, "rtn")


def _parse(override: str) -> tuple[str, int, int | None]:
    pattern, _, value = override.partition("=")
    bits, colon, block = value.partition(":")
    known = bits in ("4", "8", "16", "32") and (not colon or block in map(str, BLOCKS))
    if not pattern or not known or (colon and bits in ("16", "32")):
        raise QuantizeError(
            f"override {override!r} is not PATTERN=BITS or PATTERN=BITS:BLOCK with 4, 8, 16 or 32 bits and a block of "
            f"{', '.join(map(str, BLOCKS))}"
        )
    return pattern, int(bits), int(block) if colon else None


# --- for Core ML ---

# what the matrices and the head become; embedding and low-rank factors are int8 by rows then, vectors always float16
COREML_QUANTS = {"ane": ("fp16", "int8", "lut4", "lut6"), "gpu": ("fp16", "int8", "int4", "lut4", "lut6")}
COREML_DEFAULTS = {"ane": "lut6", "gpu": "int4"}
_ROWS = 16  # that share a table


def coreml_plan(
    spec: Spec, quant: str, profile: str, *, block: int | None = None, overrides: Sequence[str] = ()
) -> dict[str, Recipe]:
    """Decide the recipe of every tensor of a Core ML bundle.

    quant      "fp16"; "int8", a scale for every row; "lut4" or "lut6", tables for groups of rows; in profile gpu also "int4"
    block      with int4, weights that share one scale, None for 32; with lut4 and lut6, rows that share a table, None for 16
    overrides  "PATTERN=BITS", BITS 4, 6, 8 or 16; 4 is what quant says, or else lut4 in ane and int4 in gpu

    Raises  QuantizeError if one of these is not known, is not for this profile, or does not fit a tensor.
    """
    if quant in ("none", *QUANTS) and quant not in COREML_QUANTS[profile]:
        reason = (
            "the Neural Engine is reported to compute integers in blocks wrongly, or leaves them to the CPU: use lut4, or "
            "profile gpu"
            if quant == "int4"
            else "Core ML computes in float16: use fp16"
        )
        raise QuantizeError(f"quant {quant} does not go with profile {profile}: {reason}")
    if quant not in COREML_QUANTS[profile]:
        raise QuantizeError(f"quant {quant!r} is unknown: profile {profile} takes {', '.join(COREML_QUANTS[profile])}")
    if block is not None and quant in ("fp16", "int8"):
        raise QuantizeError(f"block {block} says nothing with quant {quant} here: it goes with int4, lut4 and lut6")
    if block is not None and (not 1 <= block <= BLOCKS[-1] or block & (block - 1) or (quant == "int4" and block not in BLOCKS)):
        raise QuantizeError(f"block {block} is not possible: expected a power of two up to {BLOCKS[-1]}, with int4 from 16 on")
    four = quant if quant in ("int4", "lut4") else "lut4" if profile == "ane" else "int4"
    how = {"4": four, "6": "lut6", "8": "int8", "16": "fp16"}
    chosen = {
        name: "fp16" if quant == "fp16" or w.kind == "vector" else quant if w.kind in ("matrix", "head") else "int8"
        for name, w in spec.weights.items()
    }
    for override in overrides:
        pattern, _, bits = override.partition("=")
        names = [n for n in fnmatch.filter(spec.weights, pattern) if spec.weights[n].kind != "vector"]
        if bits not in how or not pattern:
            raise QuantizeError(f"override {override!r} is not PATTERN=BITS with 4, 6, 8 or 16 bits")
        if not names:
            raise QuantizeError(f"override {override!r} matches no matrix: inspect lists their names")
        chosen |= dict.fromkeys(names, how[bits])
    return {
        name: _coreml_recipe(name, spec.weights[name].shape, spec.weights[name].kind, q, block) for name, q in chosen.items()
    }


def _coreml_recipe(name: str, shape: Shape, kind: Kind, quant: str, block: int | None) -> Recipe:
    if quant == "fp16":
        return Recipe(16)
    if kind == "table":
        return _recipe(name, shape, kind, 8, 32)  # the runtime reads it, not Core ML
    if kind == "embedding" and quant != "int8":
        raise QuantizeError(f"{name} takes 8 or 16 bits: it is read row by row")
    if quant == "int8":
        return Recipe(8, shape[1], "rtn", half=True)
    per = {"lut4": 2, "lut6": 4, "int4": BLOCKS[0]}[quant]  # inputs that fill whole bytes, or a block
    if shape[1] % per:
        raise QuantizeError(f"{name} has {shape[1]} inputs, which {quant} cannot pack: give --override '{name}=8'")
    if quant == "int4":
        size = block or 32
        while shape[1] % size:
            size //= 2
        return Recipe(4, size, "rtn", half=True)
    return Recipe(int(quant[3:]), None, "kmeans", rows=math.gcd(block or _ROWS, shape[0]))
