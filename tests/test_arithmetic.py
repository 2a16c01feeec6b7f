"""What 8-bit activations cost, apart from the weights: a trained model in which a few inputs dwarf the others.

Expected values come from graphs that onnxruntime runs by itself on a state of zeros, and from formulas in float64.
"""

import json
import math

import factory
import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from conftest import DEMO

from rwkv_edge import export, open_bundle
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import cli
from rwkv_edge.errors import ExportError, InputError
from rwkv_edge.models import rwkv7

TEXT = "Once upon a time there was a little dog. He liked to play in the garden, and he ran after the ball all day long. " * 3
PROMPT = "A little boy"  # of 12 tokens, each is more likely than the next by .5 or more
OUTLIERS = slice(5, None, 32)  # one channel of every block of 32


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def weights(outliers):
    """The demo model's tensors as stored; with outliers, one input in 32 of att.value is 300 times as large, and unused."""
    w = {n: t.read() for n, t in open_checkpoint(DEMO).tensors.items()}
    for i in range(6):
        att = f"blocks.{i}.att."
        for name in (f"{att}value.weight", f"{att}v1"):
            if name in w:
                w[name][:, OUTLIERS] = 0  # (outputs, inputs): exact arithmetic does not see these inputs
        if outliers:
            w[f"{att}x_v"].reshape(-1)[OUTLIERS] = 300  # x + (p - x) 300
    return {n: x.T if n.split(".")[-1] in rwkv7.INPUTS_FIRST else x for n, x in w.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders by name: the float32 original, and int8 with and without outliers."""
    folder = tmp_path_factory.mktemp("outliers")
    tokenizer = DEMO.with_name("tokenizer.json")
    factory.write_pth(folder / "outliers.pth", weights(True), "fp32")
    factory.write_pth(folder / "calm.pth", weights(False), "fp32")
    export(folder / "outliers.pth", folder / "original", quant="none", tokenizer=tokenizer, template="rwkv")
    for name in ("outliers", "calm"):
        export(folder / f"{name}.pth", folder / f"{name}-int8", quant="int8", tokenizer=tokenizer, template="rwkv")
    return folder


def graph(path):
    """Logits (T, V) of a token sequence by a graph, run by onnxruntime alone from a state of zeros."""
    session = ort.InferenceSession(str(path))
    shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("state.")}

    def logits(ids):
        feed = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        feed |= {"tokens": np.asarray(ids, np.int64), "positions": np.arange(len(ids))}
        return session.run(["logits"], feed)[0].astype(np.float64)

    return logits


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cost(reference, logits, y):
    """Percent of perplexity, KL in nats per token, and top-1 agreement, by their definitions."""
    p, q = log_softmax(reference), log_softmax(logits)
    at = np.arange(len(y)), np.asarray(y)
    percent = 100 * math.expm1((p[at] - q[at]).mean())
    return percent, (np.exp(p) * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).mean()


def greedy(path, ids, n):
    logits, ids = graph(path), list(ids)
    start = len(ids)
    for _ in range(n):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids[start:]


def ids_of(made):
    ids = [0, *open_bundle(made / "original").encode(TEXT)]
    assert 70 < len(ids) <= 128  # one call of a graph, and more than one piece for the errors
    return ids


def test_eval_tells_the_cost_of_arithmetic_from_that_of_weights(made, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    found = run("eval", made / "outliers-int8", "--against", made / "outliers.pth", "--text", tmp_path / "text", "--json")
    _, score = json.loads(found.stdout)["scores"]
    assert {"weights", "arithmetic"} <= score.keys()
    ids = ids_of(made)
    original, exact, runs = (
        graph(made / name)(ids[:-1]) for name in ("original/model.onnx", "outliers-int8/exact.onnx", "outliers-int8/model.onnx")
    )
    weights, arithmetic = cost(original, exact, ids[1:]), cost(exact, runs, ids[1:])
    assert arithmetic[1] > 100 * weights[1]  # or this model shows nothing
    for part, expected in (("weights", weights), ("arithmetic", arithmetic)):
        measured = [score[part][figure]["value"] for figure in ("percent", "kl", "top1")]
        assert measured == pytest.approx(expected, rel=0.03, abs=0.005), part
        assert all(score[part][figure]["error"] >= 0 for figure in ("percent", "kl", "top1"))
    assert score["kl"]["value"] == pytest.approx(cost(original, runs, ids[1:])[1], rel=0.03)


def test_eval_and_check_warn_and_name_the_remedy(made, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    for command in (["eval", made / "outliers-int8", "--text", tmp_path / "text"], ["check", made / "outliers-int8"]):
        shown = run(*command)
        assert "--arithmetic exact" in shown.stdout
        assert "--exact" in shown.stdout
        assert "outliers-int8: 8-bit activations cost a KL of" in shown.stdout
        assert len(json.loads(run(*command, "--json").stdout)["warnings"]) == 1
    for command in (["eval", made / "calm-int8", "--text", tmp_path / "text"], ["check", made / "calm-int8"]):
        calm = run(*command)
        assert (calm.exit_code, "Warning" in calm.stdout) == (0, False)
        assert json.loads(run(*command, "--json").stdout)["warnings"] == []
    exact = run("eval", made / "outliers-int8", "--text", tmp_path / "text", "--exact", "--json")
    assert json.loads(exact.stdout)["warnings"] == []


def test_eval_needs_no_checkpoint_for_the_cost_of_arithmetic(made, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    found = run("eval", made / "outliers-int8", "--text", tmp_path / "text", "--json")
    (score,) = json.loads(found.stdout)["scores"]
    assert {"weights", "arithmetic"} <= score.keys()
    ids = ids_of(made)
    exact, runs = (graph(made / "outliers-int8" / name)(ids[:-1]) for name in ("exact.onnx", "model.onnx"))
    assert score["weights"] is None
    assert score["arithmetic"]["kl"]["value"] == pytest.approx(cost(exact, runs, ids[1:])[1], rel=0.03)
    lines = run("eval", made / "outliers-int8", "--text", tmp_path / "text").stdout.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["outliers-int8", "arithmetic"]


def test_eval_shows_rows_of_both_below_each_bundle(made, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    found = run("eval", made / "original", made / "calm-int8", "--text", tmp_path / "text").stdout.splitlines()
    assert [line.split()[0] for line in found[3:7]] == ["original", "calm-int8", "weights", "arithmetic"]


def test_check_shows_both_costs_and_the_verdict_last(made):
    command = ["check", made / "outliers-int8", "--against", made / "outliers.pth"]
    report = json.loads(run(*command, "--json").stdout)
    assert {"weights", "arithmetic"} <= report.keys()
    runs = [row["own"] for row in report["rows"] if row["arithmetic"] != "exact"]
    assert report["arithmetic"] in runs
    assert report["arithmetic"]["kl"] > 100 * report["weights"]["kl"]
    assert report["arithmetic"]["kl"] > 0.05 > report["limits"]["arithmetic_kl"]
    assert report["arithmetic"]["n"] == report["n_tokens"]
    lines = run(*command).stdout.splitlines()
    costs = [line.split(" a KL")[0] for line in lines if " a KL" in line and not line.startswith("Warning: ")]
    assert costs == ["The weights cost", "The arithmetic (8-bit activations) costs"]
    assert any(line.startswith("Warning: ") for line in lines)
    assert lines[-1].startswith("The bundle ")


def test_exact_gives_what_float32_gives(made):
    """Greedy, the original's words; with 8-bit activations, others."""
    prompt = open_bundle(made / "original").encode(PROMPT)
    expected = greedy(made / "original" / "model.onnx", prompt, 12)
    args = ("run", made / "outliers-int8", "--ids", " ".join(map(str, prompt)), "-n", 12, "-t", 0, "-q")
    exact = run(*args, "--exact")
    assert exact.exit_code == 0, exact.output
    assert [int(i) for i in exact.stdout.split()] == expected
    assert [int(i) for i in run(*args).stdout.split()] != expected
    logits, _ = open_bundle(made / "outliers-int8", exact=True).feed(prompt)
    assert int(logits.argmax()) == expected[0]


def test_export_chooses_exact_arithmetic(made, tmp_path):
    out = tmp_path / "out"
    args = (
        "export",
        made / "outliers.pth",
        "--quant",
        "int8",
        "--tokenizer",
        DEMO.with_name("tokenizer.json"),
        "--template",
        "rwkv",
    )
    written = run(*args, "--arithmetic", "exact", "-o", out)
    assert written.exit_code == 0, written.output
    other = made / "outliers-int8"
    manifest, before = (json.loads((path / "manifest.json").read_text()) for path in (out, other))
    assert [(g["file"], g["role"], g["arithmetic"]) for g in manifest["graphs"]] == [("model.onnx", "run", "exact")]
    assert manifest["model_id"] == before["model_id"]
    assert sorted(p.name for p in out.iterdir()) == sorted({p.name for p in other.iterdir()} - {"exact.onnx"})
    assert (out / "model.onnx").read_bytes() == (other / "exact.onnx").read_bytes()
    assert (out / "weights.bin").read_bytes() == (other / "weights.bin").read_bytes()
    checked = run("check", out)
    assert (checked.exit_code, "Warning" in checked.stdout) == (0, False)
    prompt = open_bundle(out).encode(PROMPT)
    expected = greedy(made / "original" / "model.onnx", prompt, 12)
    (slow,), (fast,) = (json.loads(run("inspect", path, "--json").stdout)["forecasts"] for path in (out, other))
    assert slow["tok_s"]["1"] < fast["tok_s"]["1"] / 2  # measured: a fifteenth. onnxruntime has no fast exact product of 8 bits
    for more in ([], ["--exact"]):
        told = run("run", out, "--ids", " ".join(map(str, prompt)), "-n", 12, "-t", 0, "-q", *more)
        assert [int(i) for i in told.stdout.split()] == expected
    assert run(*args, "--arithmetic", "int8", "-o", tmp_path / "same").exit_code == 0
    for file in other.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()


def test_arithmetic_of_float_weights_is_exact(tmp_path, bundle):
    export(DEMO, tmp_path / "out", quant="fp16", arithmetic="exact")
    for file in bundle("demo", quant="fp16").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ExportError, match="arithmetic 'int8' has no effect on float weights"):
        export(DEMO, tmp_path / "no", quant="fp16", arithmetic="int8")
    with pytest.raises(ExportError, match="arithmetic 'int4' is unknown: expected one of int8, exact"):
        export(DEMO, tmp_path / "no", arithmetic="int4")


def test_core_ml_has_an_arithmetic_of_its_own(tmp_path):
    with pytest.raises(ExportError, match="arithmetic 'exact' is of target onnx: a Core ML bundle computes in float16"):
        export(DEMO, tmp_path / "no", target="coreml", arithmetic="exact")
    pytest.importorskip("coremltools")
    pth = factory.write_pth(tmp_path / "m.pth", factory.weights(**factory.SHAPES["odd"]))
    export(pth, tmp_path / "out", target="coreml", quant="fp16")
    with pytest.raises(InputError, match="is a Core ML bundle, which computes in float16: exact is onnxruntime's"):
        open_bundle(tmp_path / "out", exact=True)
    for command in ("run", "chat"):
        refused = run(command, tmp_path / "out", *["1"][: command == "run"], "--exact")
        assert refused.exit_code == 1
        assert "--interpret --exact" in refused.stderr
    args = ("run", tmp_path / "out", "--ids", "1 2 3", "-n", 1, "-t", 0, "--logprobs", 1, "--interpret")
    (native, *_), (exact, *_) = (run(*args, *more, "-q").stdout.split() for more in ([], ["--exact"]))
    assert float(native) == pytest.approx(float(exact), abs=0.01)
    report = json.loads(run("check", tmp_path / "out", "-n", 16, "--json").stdout)
    assert report["arithmetic"] in [row["own"] for row in report["rows"] if row["arithmetic"] == "native"]
    assert report["warnings"] == []


def test_bench_and_chat_take_exact(made, tmp_path):
    args = ("bench", made / "outliers-int8", "--prefill", 8, "--decode", 2, "-r", 1, "--threads", 1, "--json")
    for more, arithmetic in (["--exact"], "exact"), ([], "int8 activations"):
        measured = run(*args, *more)
        assert measured.exit_code == 0, measured.output
        (row,) = json.loads(measured.stdout)
        assert row["arithmetic"] == arithmetic
    tokenizer = DEMO.with_name("tokenizer.json")
    exported = ("--arithmetic", "exact", "--tokenizer", tokenizer, "--template", "rwkv", "-o", tmp_path / "exact")
    one = run("export", made / "outliers.pth", "--quant", "int8", *exported)
    assert one.exit_code == 0, one.output
    alone, exact, runs = (
        CliRunner().invoke(cli, ["chat", str(path), "-t", "0", "-n", "24", "-q", *more], input="Tell me of a dog.\n")
        for path, more in (
            (tmp_path / "exact", []),
            (made / "outliers-int8", ["--exact"]),
            (made / "outliers-int8", []),
        )
    )
    assert (alone.exit_code, exact.exit_code) == (0, 0)
    assert exact.stdout == alone.stdout != runs.stdout
