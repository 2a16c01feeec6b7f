"""Fixtures: the demo model, small random models, and bundles of them, each exported once."""

import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import factory
from hypothesis import HealthCheck, settings

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.convert import export
from rwkv_edge.runtime import open_bundle

# a job in the background ignores Ctrl-C, and so would the commands that the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("ours", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("ours")

DEMO = Path(__file__).parent.parent / "rwkv_edge" / "demo" / "rwkv7-stories-7m.pth"
GOLDEN = Path(__file__).parent / "golden"

# --- tolerances, all in standard deviations of what is compared ---

# float32 against float32 in another order of summation, over 128 tokens; measured 2e-6 to 9e-6
REFERENCE = 5e-5
# the same beside the rwkv package as it computes on this machine: 9e-6, but 5.1e-5 on a processor with AMX, in the state of
# 5.2 read as a sequence
LIVE = 1e-4
# float64 against float64: the WKV's forms; measured 1e-12 (linear attention, whose 2^44 leaves 2^-44), 1e-14 (chunk)
FORMS = 1e-10
# onnxruntime's float32 against numpy's; measured 3e-6 to 2e-5
GRAPH = 5e-5
# the same for the state, whose tensors have outliers; measured 2e-5
GRAPH_STATE = 3e-4
# 8-bit activations, rms; measured .006 on the demo model, .02 on random ones
INT8_RMS = 0.05


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def random_pth(workspace):
    """Path of a random checkpoint by the name of its shape."""

    def get(name, dtype="fp32"):
        path = workspace / f"{name}-{dtype}.pth"
        return (
            path
            if path.exists()
            else factory.write_pth(path, factory.weights(**{**factory.SHAPES, "world": factory.WORLD}[name]), dtype)
        )

    return get


@pytest.fixture(scope="session")
def bundle(workspace, random_pth):
    """Path of a bundle, exported once: bundle("demo", quant="int4", wkv="plain")."""

    def get(model="demo", **options):
        path = workspace / "-".join([model, *(f"{k}={v}" for k, v in sorted(options.items()))]).replace("*", "_")
        if not path.exists():
            export(DEMO if model == "demo" else random_pth(model), path, **options)
        return path

    return get


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle to damage."""

    def get(model="odd", **options):
        path = tmp_path / "copy"
        shutil.copytree(bundle(model, **options), path)
        return path

    return get


@pytest.fixture(scope="session")
def model(bundle):
    """An open model, shared: its session has no state of its own."""
    cache = {}

    def get(name="demo", role="run", **options):
        key = (name, role, *sorted(options.items()))
        if key not in cache:
            cache[key] = open_bundle(bundle(name, **options), threads=2, exact=role == "exact")
        return cache[key]

    return get


@pytest.fixture(scope="session")
def weights(random_pth):
    """Spec and whole weights of a checkpoint, in memory."""
    cache = {}

    def get(name="demo"):
        if name not in cache:
            checkpoint = open_checkpoint(DEMO if name == "demo" else random_pth(name))
            cache[name] = checkpoint.spec, {n: t.read() for n, t in checkpoint.tensors.items()}
        return cache[name]

    return get


@pytest.fixture(scope="session")
def golden():
    """The rwkv package's own numbers."""

    def get(name):
        with np.load(GOLDEN / f"{name}.npz") as f:
            return dict(f)

    return get


def apart(x, reference):
    """Largest difference in standard deviations of the reference."""
    return float(np.abs(np.asarray(x, np.float64) - reference).max() / (np.std(reference) or 1.0))
