"""What quantization costs the demo model: perplexity on a text, against its own float32 bundle, pair by pair.

    python benchmarks/quality.py TEXT [--windows 24] [--tokens 256]

Every window begins from a zero state. "exact" computes matrix products in float32; "run" rounds activations to 8 bits,
as the bundle does on a device.
"""

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np

import rwkv_edge
from rwkv_edge.convert import export
from rwkv_edge.evaluate import cost, log_probabilities, nll

CHECKPOINT = Path(rwkv_edge.__file__).parent / "demo" / "rwkv7-stories-7m.pth"
RECIPES = [("fp16", None, ()), ("int8", 32, ()), ("int8", 128, ())]
RECIPES += [("int4", block, ()) for block in (16, 32, 64, 128, 256)]
RECIPES += [("int4", block, ("head.weight=8",)) for block in (32, 128)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export(CHECKPOINT, f"{folder}/fp32", quant="none")
        reference = rwkv_edge.open_bundle(f"{folder}/fp32")
        ids = reference.encode(a.text.read_text())
        windows = [ids[i * a.tokens : (i + 1) * a.tokens] for i in range(a.windows)]
        log_p = [log_probabilities(reference, w) for w in windows]
        base = np.stack([nll(p, w) for p, w in zip(log_p, windows, strict=True)])
        print(f"{base.size} predictions, float32: {base.mean():.4f} nats, perplexity {math.exp(base.mean()):.3f}\n")
        print("| weights | bits/weight | MB | arithmetic | perplexity | KL, nats | top-1 |\n|---|---|---|---|---|---|---|")
        for quant, block, overrides in RECIPES:
            name = " ".join([quant, *([f"block {block}"] if block else []), *overrides])
            path = Path(folder, name.replace(" ", "-"))
            written = export(CHECKPOINT, path, quant=quant, block=block, overrides=overrides)
            for role in ("run",) if quant == "fp16" else ("exact", "run"):
                model = rwkv_edge.open_bundle(path, role=role)
                found = [log_probabilities(model, w) for w in windows]
                c = cost(np.stack([nll(q, w) for q, w in zip(found, windows, strict=True)]), base)
                kl = np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in zip(log_p, found, strict=True)])
                top1 = np.mean([(p.argmax(-1) == q.argmax(-1)).mean() for p, q in zip(log_p, found, strict=True)])
                print(
                    f"| {name} | {written.bits_per_weight:.2f} | {written.nbytes / 1e6:.1f} | {role} | "
                    f"{c.percent:+.3f} % ± {c.error:.3f} | {kl:.6f} | {100 * top1:.1f} % |"
                )


if __name__ == "__main__":
    main()
