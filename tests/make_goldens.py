"""Make tests/golden/*.npz with the rwkv package: `make goldens`.

Every file holds tokens, the logits of all or some positions, and the final state, computed in float32 token by token, and
says which versions made it.
"""

import json
import os
import platform
import subprocess
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


def run_rwkv(pth: Path, ids: list[int], *, version: str = "7", one_by_one: bool = True):
    """Logits (T, V) and state of the rwkv package, in float32.  Version 7 and the others need a process each."""
    os.environ.update(RWKV_V7_ON=str(int(version[0] == "7")), RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    if version == "7a":
        os.environ["RWKV_DE_VERSION"] = "1"
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
    tensors = ("att_x", "aa", "bb", "pp", "ffn_x") if version == "4" else ("att_x", "wkv", "ffn_x")
    names = [f"{i}.{t}" for i in range(model.args.n_layer) for t in tensors]
    state = {name: s.float().numpy() for name, s in zip(names, state, strict=True)}
    if version in ("5.0", "5.1", "5.2", "6"):  # it keeps [head, key, value] there
        state = {n: s.swapaxes(-1, -2).copy() if n.endswith("wkv") else s for n, s in state.items()}
    return logits, state


def run_in_a_process(pth: Path, ids: list[int], *, version: str = "7", one_by_one: bool = True):
    """The same in a process of its own: the package's switches are set at import."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.npz")
        code = (
            "import sys, json, numpy as np; from pathlib import Path\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r}); from make_goldens import run_rwkv\n"
            "pth, ids, version, one_by_one, out = sys.argv[1:]\n"
            "logits, state = run_rwkv(Path(pth), json.loads(ids), version=version, one_by_one=one_by_one == '1')\n"
            "np.savez(out, logits=logits, **state)\n"
        )
        args = [str(pth), json.dumps(ids), version, "1" if one_by_one else "0", str(out)]
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with np.load(out) as f:
            state = dict(f)
    return state.pop("logits"), state


def main() -> None:
    made_by = ", ".join(f"{p} {version(p)}" for p in ("rwkv", "torch", "numpy")) + f", Python {platform.python_version()}"
    with tempfile.TemporaryDirectory() as folder:
        jobs = {"demo": (DEMO, "7", 4096, np.arange(0, N_TOKENS, 18))}
        for name, shape in factory.SHAPES.items():
            path = factory.write_pth(Path(folder, f"{name}.pth"), factory.weights(**shape), "fp32")
            jobs[name] = (path, shape.get("version", "7"), shape["n_vocab"], np.arange(N_TOKENS))
        for name, (path, rwkv, n_vocab, positions) in jobs.items():
            ids = factory.tokens(N_TOKENS, n_vocab)
            logits, state = run_in_a_process(path, ids, version=rwkv)
            content = {"tokens": ids, "positions": positions, "logits": logits[positions], "std": logits.std()}
            np.savez_compressed(
                GOLDEN / f"{name}.npz", made_by=made_by, **content, **{f"state.{n}": s for n, s in state.items()}
            )
            print(f"{name}: logits std {logits.std():.3f}, {(GOLDEN / f'{name}.npz').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
