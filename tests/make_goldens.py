"""Make tests/golden/*.npz with the rwkv package: `make goldens`.

Every file holds tokens, the logits of all or some positions, and the final state, computed in float32 token by token, and
says which versions made it.
"""

import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import factory

GOLDEN = Path(__file__).parent / "golden"
DEMO = Path(__file__).parent.parent / "rwkv_edge" / "demo" / "rwkv7-stories-7m.pth"
N_TOKENS = 128


def run_rwkv(pth: Path, ids: list[int], *, one_by_one: bool = True):
    """Logits (T, V) and state of the rwkv package, in float32."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    import contextlib

    with contextlib.redirect_stdout(sys.stderr):
        import torch
        from rwkv.model import RWKV

        torch.set_grad_enabled(False)
        model = RWKV(str(pth.with_suffix("")), "cpu fp32")
        if one_by_one:
            state, rows = None, []
            for token in ids:
                row, state = model.forward([token], state)
                rows.append(row.float().numpy().copy())
            logits = np.stack(rows)
        else:
            out, state = model.forward(ids, None, full_output=True)
            logits = out.float().numpy()
    names = [f"{i}.{t}" for i in range(model.args.n_layer) for t in ("att_x", "wkv", "ffn_x")]
    return logits, {name: s.float().numpy() for name, s in zip(names, state, strict=True)}


def main() -> None:
    made_by = ", ".join(f"{p} {version(p)}" for p in ("rwkv", "torch", "numpy")) + f", Python {platform.python_version()}"
    with tempfile.TemporaryDirectory() as folder:
        jobs = {"demo": (DEMO, 4096, np.arange(0, N_TOKENS, 18))}
        for name, shape in factory.SHAPES.items():
            path = factory.write_pth(Path(folder, f"{name}.pth"), factory.weights(**shape), "fp32")
            jobs[name] = (path, shape["n_vocab"], np.arange(N_TOKENS))
        for name, (path, n_vocab, positions) in jobs.items():
            ids = factory.tokens(N_TOKENS, n_vocab)
            logits, state = run_rwkv(path, ids)
            content = {"tokens": ids, "positions": positions, "logits": logits[positions], "std": logits.std()}
            np.savez_compressed(
                GOLDEN / f"{name}.npz", made_by=made_by, **content, **{f"state.{n}": s for n, s in state.items()}
            )
            print(f"{name}: logits std {logits.std():.3f}, {(GOLDEN / f'{name}.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
