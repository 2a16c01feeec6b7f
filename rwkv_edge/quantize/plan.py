"""Which tensor gets how many bits: data, made before any weight is read."""

import fnmatch
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
