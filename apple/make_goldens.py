"""Make the files that the Swift tests and on_a_mac.py compare with: apple/Tests/RWKVEdgeTests/Goldens/*.json

    python apple/make_goldens.py                     all of them
    python apple/make_goldens.py --only tokenizers   those that need no Core ML export

The bundles that the model's goldens belong to are written to --bundles (build/apple-bundles), where the tests find them. The
same weights and options give the same bytes, so they need not be kept: make them on any machine.
"""

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_edge.runtime.state import State
from rwkv_edge.tokenizer import WORLD, open_tokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEMO = ROOT / "rwkv_edge" / "demo" / "rwkv7-stories-7m.pth"
DEMO_TOKENIZER = DEMO.with_name("tokenizer.json")
GOLDENS = HERE / "Tests" / "RWKVEdgeTests" / "Goldens"

# what the demo is exported as: the name of the folder, and the options
BUNDLES: dict[str, dict[str, str]] = {
    "ane-lut4": {"profile": "ane", "quant": "lut4"},
    "ane-lut4-packed": {"profile": "ane", "quant": "lut4", "coreml_state": "packed"},
    "gpu-int4": {"profile": "gpu", "quant": "int4"},
}
PROMPT = "Once upon a time there was a little girl who lived in a house by the sea, and every morning"  # more than a chunk
N_STEPS = 8  # generated greedily after the prompt
N_VALUES = 64  # of the logits, and of each state tensor

TEXTS = [
    "",
    "Hello, world!",
    "  two spaces, a\ttab, a newline\nand a return\r\n",
    "She said: \"It's 3.50 € -- naïve café\" ... don't you'll we've",
    "日本語とтекст и العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪 e\u0301 \u200d",
    "def f(x):\n        return x ** 2  # 12345678901234567890\n\n\n",
    "\u0000\u0001\u007f\u0080\u00a0\u2028\ufeff\ufffd\U0010ffff",
    "User: What is 1 + 1?\n\nAssistant:",
    "a" * 100 + " " * 200 + "-" * 90,
]
# bytes that end within characters, or are none: for World alone
BROKEN = [b"\xff\xfe", "ab€".encode()[:-1], b"\xe0\x80\xed\xa0\x80\xf4\x90\x80\x80", b"\xf0\x9f\x91", bytes(range(256))]


def tokenizer_goldens(path: Path, *, also: list[bytes]) -> dict[str, Any]:
    """Ids of texts, the texts of the ids, and what a stream gives for each id in turn."""
    tokenizer = open_tokenizer(path)
    cases = []
    for text in [*TEXTS, *also]:
        ids = tokenizer.encode(text)  # type: ignore[arg-type]  # bytes are only given to World
        stream = tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        data = text if isinstance(text, bytes) else text.encode()
        case = {"bytes": base64.b64encode(data).decode(), "ids": ids, "pieces": pieces, "rest": stream.finish()}
        cases.append(case | {"decoded": tokenizer.decode(ids)})
    return {"n_vocab": tokenizer.n_vocab, "cases": cases}


def state_golden() -> dict[str, Any]:
    """Write a state file of two layers, in float16 and of a made-up model; give the numbers in it."""
    rng = np.random.default_rng(7)
    tensors = {}
    for layer in range(2):
        tensors[f"{layer}.att_x"] = rng.normal(size=(4,)).astype(np.float32)
        tensors[f"{layer}.wkv"] = rng.normal(size=(2, 2, 2)).astype(np.float32)
        tensors[f"{layer}.ffn_x"] = rng.normal(size=(4,)).astype(np.float32)
    state = State("5" * 64, 12, tensors, rng.normal(size=(16,)).astype(np.float32))
    state.save(GOLDENS / "half.state", half=True)
    halves = {name: x.astype(np.float16) for name, x in [*tensors.items(), ("logits", state.logits)] if x is not None}
    return {
        "model_id": state.model_id,
        "n_tokens": state.n_tokens,
        "tensors": {
            name: {"shape": list(x.shape), "values": x.reshape(-1).astype(float).tolist()} for name, x in halves.items()
        },
    }


def model_goldens(bundle: Path) -> dict[str, Any]:
    """Logits and states of a bundle as its file computes them, each operation rounded to the type that the file declares."""
    from rwkv_edge import open_bundle

    model = open_bundle(bundle, interpret="native")  # type: ignore[call-arg]
    prompt = model.encode(PROMPT)
    logits, state = model.feed(prompt)
    steps = []
    after_prompt = state
    for _ in range(N_STEPS):
        token = int(logits.argmax())
        # the choice is no golden where the next best is as good: float16 may differ from device to device
        best = np.sort(logits)[-2:]
        steps.append({"argmax": token, "margin": _round(best[1] - best[0]), "logits": _rounded(logits[:N_VALUES])})
        logits, state = model.feed([token], state)
    return {
        "model_id": model.bundle.model_id,
        "prompt": PROMPT,
        "ids": prompt,
        "deviation": _round(logits.std()),
        "steps": steps,
        "state": {"after": "prompt", "n_tokens": after_prompt.n_tokens, "tensors": _tensors(after_prompt)},
    }


def _tensors(state: State) -> dict[str, Any]:
    """Of the first and the last layer: the first values, and the norm, which all of them have a part in."""
    last = max(int(name.split(".")[0]) for name in state.tensors)
    return {
        name: {
            "shape": list(x.shape),
            "values": _rounded(x.reshape(-1)[:N_VALUES]),
            "norm": _round(np.sqrt(np.square(x).sum())),
        }
        for name, x in state.tensors.items()
        if int(name.split(".")[0]) in (0, last)
    }


def _round(x: float) -> float:
    return float(f"{float(x):.6g}")


def _rounded(xs: Any) -> list[float]:
    return [_round(x) for x in xs]


def write(name: str, golden: Any) -> None:
    path = GOLDENS / name
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tokenizers", "model"], help="make these alone")
    parser.add_argument("--bundles", type=Path, default=ROOT / "build" / "apple-bundles", help="where the bundles go")
    parser.add_argument("--export-only", action="store_true", help="write the bundles and no goldens")
    args = parser.parse_args()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    if args.only != "model" and not args.export_only:
        write("world.json", tokenizer_goldens(WORLD, also=BROKEN))
        write("tokenizer.json", tokenizer_goldens(DEMO_TOKENIZER, also=[]))
        write("half.json", state_golden())
    if args.only != "tokenizers":
        from rwkv_edge import export

        for name, options in BUNDLES.items():
            args.bundles.mkdir(parents=True, exist_ok=True)
            export(DEMO, args.bundles / name, target="coreml", force=True, **options)  # type: ignore[arg-type]
            if not args.export_only:
                write(f"{name}.json", model_goldens(args.bundles / name))


if __name__ == "__main__":
    main()
