"""That inspect says beforehand what export writes; how memory and speed come out is measured by hand, in forecast.py."""

import json
import math

import factory
import pytest
from click.testing import CliRunner
from conftest import DEMO

from rwkv_edge import inspection
from rwkv_edge.bundle import read_bundle
from rwkv_edge.cli import cli
from rwkv_edge.convert import export
from rwkv_edge.errors import InputError
from rwkv_edge.forecast import bandwidth, forecast, parse_size
from rwkv_edge.inspection import inspect
from rwkv_edge.models import spec_of
from rwkv_edge.quantize import COREML_DEFAULTS, COREML_QUANTS, plan

RATE = {1: 20e9, 2: 30e9}


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """A machine whose memory is always as fast."""
    monkeypatch.setattr(inspection, "bandwidth", lambda: RATE)


def run(*args):
    return CliRunner().invoke(cli, ["inspect", *map(str, args)])


def big():
    """RWKV-7 of 13.3 billion parameters: shapes alone."""
    C, V, F = 4096, 65536, 16384
    shapes = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,)}
    for i in range(61):
        norms = ["ln0"] * (i == 0) + ["ln1", "ln2", "att.ln_x"]
        vectors = [f"{norm}.{x}" for norm in norms for x in ("weight", "bias")] + [f"att.x_{c}" for c in "rwkvag"]
        vectors += ["att.w0", "att.a0", "att.k_k", "att.k_a", "ffn.x_k"] + ["att.v0"] * (i > 0)
        layer = dict.fromkeys(vectors, (C,)) | {"att.r_k": (64, 64), "ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}
        layer |= {f"att.{n}.weight": (C, C) for n in ("receptance", "key", "value", "output")}
        for c, rank in [("w", 192), ("a", 192), ("g", 384), ("v", 128)][: 3 + (i > 0)]:
            layer |= {f"att.{c}1": (rank, C), f"att.{c}2": (C, rank)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    return spec_of(shapes)


@pytest.mark.parametrize(("quant", "block"), inspection.RECIPES)
def test_the_bundle_is_as_large_as_was_said(bundle, quant, block):
    path = bundle("demo", quant=quant, **({"block": block} if block else {}))
    (said,) = inspect(DEMO, quant=quant, block=block).forecasts
    (found,) = inspect(path).forecasts
    assert found.nbytes == sum(file.stat().st_size for file in path.iterdir())
    assert said.nbytes == pytest.approx(found.nbytes, rel=1e-3)
    assert (said.read_bytes, said.peak_bytes, said.bits_per_weight) == (
        found.read_bytes,
        found.peak_bytes,
        found.bits_per_weight,
    )


@pytest.mark.parametrize("sizes", [*factory.BEFORE_7.values(), factory.DEEP_EMBED], ids=lambda sizes: sizes["version"])
def test_every_version_s_weights_are_as_large_as_was_said(tmp_path, sizes):
    """Weights to the byte; graphs and manifest, nearly all of such toys, nearly: these have no tokenizer and no prompt."""
    pth = factory.write_pth(tmp_path / "model.pth", factory.weights(**sizes))
    export(pth, tmp_path / "bundle", quant="int4")
    (said,), (found,) = inspect(pth, quant="int4").forecasts, inspect(tmp_path / "bundle").forecasts
    assert said.nbytes == pytest.approx(found.nbytes, abs=2500)
    assert (said.read_bytes, said.peak_bytes) == (found.read_bytes, found.peak_bytes)


def test_a_quantized_checkpoint_too(tmp_path, bundle):
    file = tmp_path / "q.safetensors"
    assert CliRunner().invoke(cli, ["quantize", str(DEMO), "-o", str(file), "-q"]).exit_code == 0
    (tmp_path / "tokenizer.json").write_bytes(DEMO.with_name("tokenizer.json").read_bytes())
    (said,) = inspect(file).forecasts
    (found,) = inspect(bundle("demo", quant="int4")).forecasts
    assert said.recipe == found.recipe == "as stored"
    assert said.nbytes == pytest.approx(found.nbytes, rel=1e-3)
    assert said.tok_s == found.tok_s


def test_what_export_would_bring_along(random_pth):
    """The World vocabulary for a model of its size, and nothing for others."""
    world, odd = (inspect(random_pth(name), quant="none").forecasts[0] for name in ("world", "odd"))
    stored = 4 * 65536 * 16 * 2
    assert 1.15e6 < world.nbytes - stored < 1.3e6
    assert odd.nbytes < 1e6


def test_more_bits_take_more_and_are_slower():
    none, fp16, int8, int4, int4_128 = inspect(DEMO).forecasts
    assert [f.recipe for f in inspect(DEMO).forecasts] == ["none", "fp16", "int8", "int4", "int4 block 128"]
    for of in ("nbytes", "peak_bytes", "anonymous_bytes", "read_bytes"):
        a, b, c, d = (getattr(f, of) for f in (none, int8, int4, int4_128))
        assert a > b > c > d, of
    assert fp16.nbytes < none.nbytes
    assert fp16.read_bytes == none.read_bytes  # it is widened
    for n in RATE:
        assert none.tok_s[n] < int8.tok_s[n] < int4.tok_s[n] < int4_128.tok_s[n]
    assert int4.tok_s[1] < int4.tok_s[2]


def test_the_largest_model():
    spec = big()
    assert spec.n_parameters == 13_269_245_952
    found = forecast(spec, plan(spec, "int4", block=128), recipe="int4 block 128", bandwidth=RATE, memory=10**10)
    assert found.nbytes == pytest.approx(found.bits_per_weight * spec.n_parameters / 8, rel=1e-3)
    assert found.nbytes < found.peak_bytes < 10e9
    assert found.anonymous_bytes < found.peak_bytes
    assert found.fits
    assert 1 < found.tok_s[1] < found.tok_s[2] < 4


def test_memory_is_measured():
    found = bandwidth()
    assert next(iter(found)) == 1
    assert all(1e8 < rate < 1e13 for rate in found.values())


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("4GB", 4 * 10**9),
        ("4 GiB", 4 << 30),
        ("512mb", 512 * 10**6),
        ("1.5MiB", 3 << 19),
        ("800kB", 800_000),
        ("77", 77),
        ("7B", 7),
    ],
)
def test_sizes(text, n):
    assert parse_size(text) == n


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "-1", "4GBs", "nan", "1e9", "4G"])
def test_what_is_no_size(text):
    with pytest.raises(
        InputError, match="is no size: expected a number of bytes, or of kB, MB, GB, KiB, MiB or GiB, such as 4GB"
    ):
        parse_size(text)


def test_fits():
    found = run(DEMO, "--fits", "125MB")
    assert (found.exit_code, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("recipe"))
    assert lines[at].split()[-1] == "fits"
    answers = {line[:14].rstrip(): line.split()[-1] for line in lines[at + 1 : at + 6]}
    assert answers == {"none": "no", "fp16": "no", "int8": "yes", "int4": "yes", "int4 block 128": "yes"}
    assert "numpy just read memory at 20.0 GB/s on 1, 30.0 GB/s on 2." in found.stdout
    assert max(map(len, lines)) <= 100 + len(str(DEMO))


def test_nothing_fits_and_the_one_asked_for_does_not(bundle):
    assert run(DEMO, "--fits", "1MB").exit_code == 3
    assert run(DEMO, "--fits", "1GB", "--quant", "none").exit_code == 0
    assert run(DEMO, "--fits", "1MB", "--quant", "none", "--json").exit_code == 3
    failed = run(bundle("demo", quant="int4"), "--fits", "1MB")
    assert (failed.exit_code, failed.stderr) == (3, "")
    assert "as stored" in failed.stdout
    wrong = run(DEMO, "--fits", "1 apple")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.count("\n") == 1


def test_json_has_all_numbers():
    found = json.loads(run(DEMO, "--json", "--fits", "1GB", "--override", "head.weight=8").stdout)
    assert found["bandwidth"] == {"1": 20e9, "2": 30e9}
    (f,) = found["forecasts"]
    assert {name: type(x) for name, x in f.items()} == {
        "recipe": str,
        "nbytes": int,
        "bits_per_weight": float,
        "peak_bytes": int,
        "anonymous_bytes": int,
        "read_bytes": int,
        "tok_s": dict,
        "fits": bool,
    }
    assert f["recipe"] == "int4, head.weight=8"
    assert list(f["tok_s"]) == ["1", "2"]
    assert json.loads(run(DEMO, "--json").stdout)["forecasts"][0]["fits"] is None


# --- Core ML ---


@pytest.mark.parametrize("name", ["demo", "v6", "v7a", "world"])
@pytest.mark.parametrize(("profile", "quant"), [("ane", "fp16"), ("ane", "lut4"), ("gpu", "int4")])
def test_a_core_ml_bundle_is_as_large_as_was_said(name, profile, quant, bundle, random_pth):
    path = bundle(name, target="coreml", profile=profile, quant=quant)
    checkpoint = DEMO if name == "demo" else random_pth(name)
    (said,) = inspect(checkpoint, target="coreml", profile=profile, quant=quant).coreml
    nbytes = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    assert (said.recipe, said.profile, said.packages) == (quant, profile, 1)
    assert abs(said.nbytes / nbytes - 1) < (0.005 if name in ("demo", "world") else 0.05)  # of a small one, half is graph
    assert said.state_bytes == 2 * sum(math.prod(t["shape"]) for t in read_bundle(path).manifest["state"])
    found = inspect(path)
    assert (found.what, found.forecasts, found.coreml, found.state_bytes) == ("bundle for Core ML", (), (), said.state_bytes)
    assert found.about["profile"] == profile
    assert found.about["packages"] == 1


def test_core_ml_recipes_to_choose_from():
    found = inspect(DEMO, target="coreml")
    said = [(f.profile, f.recipe) for f in found.coreml]
    assert sorted(said) == sorted((p, q) for p in COREML_QUANTS for q in COREML_QUANTS[p])
    assert [q for p, q in said if (p, q) in COREML_DEFAULTS.items()] == ["lut6", "int4"]
    assert (said[0], found.column) == (("ane", "lut6"), "as lut6")
    assert [f.profile for f in inspect(DEMO, target="coreml", quant="int4").coreml] == ["gpu"]
    result = CliRunner().invoke(cli, ["inspect", str(DEMO), "--target", "coreml", "--profile", "ane", "--quant", "lut4"])
    assert result.exit_code == 0
    assert next(line for line in result.stdout.splitlines() if line.startswith("lut4")).split() == [
        "lut4",
        "ane",
        "5.3",
        "MB",
        "4.94",
        "1",
        "4.5",
        "MB",
    ]
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profile", "ane"], "--profile is for Core ML: add --target coreml"),
        (["--target", "coreml", "--fits", "4GB"], "--fits is for onnxruntime"),
        (["--quant", "lut6"], "quant lut6 is for Core ML: give target coreml with it"),
        (["--target", "coreml", "--quant", "none"], "quant 'none' is not for Core ML: expected fp16, int8, int4, lut4 or lut6"),
        (["--target", "coreml", "--profile", "ane", "--quant", "int4"], "use lut4, or profile gpu"),
    ],
)
def test_what_cannot_be_forecast_is_refused(arguments, words):
    result = CliRunner().invoke(cli, ["inspect", str(DEMO), *arguments])
    assert (result.exit_code, result.stdout) == (1, "")
    assert words in result.stderr


def test_a_core_ml_bundle_has_no_recipe_to_choose(bundle):
    path = str(bundle("demo", target="coreml", quant="fp16"))
    for arguments in (["--target", "coreml"], ["--quant", "int4"]):
        result = CliRunner().invoke(cli, ["inspect", path, *arguments])
        assert (result.exit_code, "is stored as it is" in result.stderr) == (1, True)
    result = CliRunner().invoke(cli, ["inspect", path, "--fits", "4GB"])
    assert (result.exit_code, "--fits is for onnxruntime" in result.stderr) == (1, True)
    result = CliRunner().invoke(cli, ["inspect", path])
    assert "profile ane, explicit state, 1 package: decode takes 1 token, prefill 16; iOS 18.0, macOS 15.0" in result.stdout
