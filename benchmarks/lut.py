"""What tables of values (palettised weights) cost a model, beside int8 and int4: KL, perplexity, same top token, in float32.

    python benchmarks/lut.py TEXT [CHECKPOINT] [--calibrate TEXT] [--windows 24] [--tokens 256]

Matrices and the head as the table says; embedding and low-rank factors in 8 bits a weight, one scale a row (the first line
has only these); all else, and all arithmetic, in float32. Every window begins from a zero state. Importance is measured on
the text given with --calibrate, or else on 32 texts of 256 tokens that the model itself makes up: never on TEXT.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_edge
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.convert import export
from rwkv_edge.evaluate import documents, passages
from rwkv_edge.models import model_of
from rwkv_edge.qtensor import QTensor
from rwkv_edge.quantize import kmeans, mean_squares, rtn
from rwkv_edge.reference import run_reference
from rwkv_edge.runtime import open_bundle
from rwkv_edge.runtime.sampling import log_softmax
from rwkv_edge.spec import Spec
from rwkv_edge.texts import find_texts

CHECKPOINT = Path(rwkv_edge.__file__).parent / "demo" / "rwkv7-stories-7m.pth"
LUTS = [(4, 1), (4, 4), (4, 8), (4, 16), (4, 32), (6, 16)]

Array = np.ndarray[Any, Any]
Recipe = Callable[[Array, Array], tuple[Any, int]]  # from weights and importance to what stands for them, and its bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    a = parser.parse_args()
    checkpoint = open_checkpoint(a.checkpoint)
    spec, weights = checkpoint.spec, {name: t.read() for name, t in checkpoint.tensors.items()}
    tokenizer = find_texts(checkpoint).tokenizer
    assert tokenizer, "no tokenizer beside the checkpoint"
    windows = [p.ids for p in passages(documents(a.text), tokenizer, bos_token_id=0, window=a.tokens, limit=a.windows)]
    ids = [i for text in documents(a.calibrate) for i in tokenizer.encode(text)] if a.calibrate else made_up(a.checkpoint)
    importance = mean_squares(spec, weights, ids)

    reference = [log_softmax(read(spec, weights, window)) for window in windows]
    nll = [-p[np.arange(len(p)), window[1:]] for p, window in zip(reference, windows, strict=True)]
    n, perplexity = sum(map(len, nll)), np.exp(np.concatenate(nll).mean())
    print(f"{n:,} predictions, float32: perplexity {perplexity:.3f}; importance from {len(ids):,} tokens\n")
    print("| weights | bits/weight | perplexity | KL, nats | top-1 |\n|---|---|---|---|---|")
    others = {
        name: int8_per_row(x)[0] if spec.weights[name].kind in ("embedding", "low_rank") else x for name, x in weights.items()
    }
    for name, recipe in recipes().items():
        used, nbytes, size = dict(others), 0, 0
        for tensor, weight in spec.weights.items():
            if weight.kind in ("matrix", "head"):
                used[tensor], more = recipe(weights[tensor], importance[tensor])
                nbytes, size = nbytes + more, size + weight.size
        print(f"| {name} | {8 * nbytes / size:.2f} | {' | '.join(compare(spec, used, windows, reference, nll))} |", flush=True)


def recipes() -> dict[str, Recipe]:
    def lut(bits: int, rows: int, calibrated: bool) -> Recipe:
        def quantize(w: Array, importance: Array) -> tuple[Any, int]:
            q = kmeans(w, bits=bits, rows=rows, importance=importance if calibrated else None)
            return q, q.nbytes

        return quantize

    found: dict[str, Recipe] = {"matrices in fp32": lambda w, _: (w, w.nbytes), "int8, a row": lambda w, _: int8_per_row(w)}
    found["int4, blocks of 32"] = lambda w, _: int4_block_32(w)
    for bits, rows in LUTS:
        found[f"lut{bits}, {rows} rows"] = lut(bits, rows, False)
        found[f"lut{bits}, {rows} rows, importance"] = lut(bits, rows, True)
    return found


def int8_per_row(w: Array) -> tuple[Array, int]:
    scale = np.abs(w).max(axis=1, keepdims=True) / 127
    return np.rint(w / np.where(scale == 0, 1, scale)) * scale, w.size + 2 * len(w)


def int4_block_32(w: Array) -> tuple[QTensor, int]:
    """As rtn does it, with scales rounded to float16."""
    q = rtn(w, bits=4, block=32)
    q = QTensor(q.codes, q.scales.astype(np.float16).astype(np.float32), q.bits, q.block)
    return q, q.nbytes - 2 * q.scales.size


def made_up(checkpoint: Path) -> list[int]:
    """Texts of the model's own, at temperature 1."""
    with tempfile.TemporaryDirectory() as folder:
        model = open_bundle(export(checkpoint, Path(folder, "fp32"), quant="none").path, threads=1)
        first, ids = model.bos_token_id, []
        for seed in range(32):
            ids += [first, *(t.id for t in model.generate([first], max_tokens=255, temperature=1.0, top_p=1.0, seed=seed))]
    return ids


def read(spec: Spec, weights: Mapping[str, Any], window: list[int]) -> Array:
    """Logits of every token but the last."""
    chunk, state, logits = model_of(spec.version).MAX_TOKENS["chunk"], None, []
    for i in range(0, len(window) - 1, chunk):
        part, state = run_reference(spec, weights, window[:-1][i : i + chunk], state, wkv_form="chunk")
        logits.append(part)
    return np.concatenate(logits)


def compare(
    spec: Spec, weights: Mapping[str, Any], windows: list[list[int]], reference: list[Array], nll: list[Array]
) -> tuple[str, str, str]:
    """Perplexity over that of float32, KL and agreement, with standard errors over windows."""
    W = {name: x if isinstance(x, np.ndarray) else x.dequantize() for name, x in weights.items()}
    rows = []
    for window, p, expected in zip(windows, reference, nll, strict=True):
        q = log_softmax(read(spec, W, window))
        more = -q[np.arange(len(q)), window[1:]] - expected
        rows.append((more.mean(), (np.exp(p) * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).mean()))
    (more, kl, top1), (more_error, kl_error, _) = np.mean(rows, 0), np.std(rows, 0, ddof=1) / np.sqrt(len(rows))
    percent, error = 100 * (np.exp(more) - 1), 100 * more_error
    return f"{percent:+.2f} % ± {error:.2f}", f"{kl:.5f} ± {kl_error:.5f}", f"{100 * top1:.1f} %"


if __name__ == "__main__":
    main()
