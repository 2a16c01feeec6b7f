"""The folder that a device gets: written whole or not at all, refused when damaged, foreign or newer."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import factory
import jsonschema
import numpy as np
import onnx
import pytest
from conftest import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_edge import Chat, export, open_bundle
from rwkv_edge.bundle import read_bundle
from rwkv_edge.check import check as check_bundle
from rwkv_edge.convert import TEMPLATES, quantize
from rwkv_edge.errors import BundleError, CheckFailed, CheckpointError, InputError, OutputError, QuantizeError, RwkvEdgeError
from rwkv_edge.tokenizer import WORLD

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "bundle.schema.json").read_text())


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("options", [{"quant": "none"}, {"quant": "int4"}, {"quant": "fp16", "wkv": "plain"}, {"wkv": "step"}])
def test_manifest_is_as_documented(options, bundle):
    for name in ("odd", "demo"):
        path = bundle(name, **options)
        manifest = json.loads((path / "manifest.json").read_text())
        jsonschema.validate(manifest, SCHEMA)
        assert set(manifest["files"]) == {f.name for f in path.iterdir()} - {"manifest.json"}
        assert str(path.parent) not in json.dumps(manifest)


def test_a_flipped_byte_anywhere_is_found(copy):
    path = copy(quant="int4")
    for file in sorted(f for f in path.iterdir() if f.name != "manifest.json"):
        data = file.read_bytes()
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        with pytest.raises(BundleError, match=f"{file.name} is damaged: its sha256 is not the manifest's"):
            open_bundle(path)
        file.write_bytes(data[:-1])
        with pytest.raises(BundleError, match=rf"{file.name} has {len(data) - 1} bytes, expected {len(data)}"):
            open_bundle(path, verify=False)
        file.unlink()
        with pytest.raises(BundleError, match=f"{file.name} is missing"):
            open_bundle(path)
        file.write_bytes(data)
    open_bundle(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "is of format 2 and this release reads format 1: update rwkv-edge"),
        (lambda m: m.pop("format"), "it states no format"),
        (lambda m: m.pop("tensors"), "is damaged"),
        (lambda m: m["spec"].update(n_layer=9), "does not fit 9 layers"),
        (
            lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
            "names '../x': a bundle's files lie in its own folder",
        ),
        (lambda m: m["graphs"][0].update(file="/etc/passwd"), "uses '/etc/passwd' but does not list it"),
        (lambda m: m["tensors"]["head.weight"].update(offset=10**9), "places head.weight outside weights.bin"),
        (lambda m: m["tensors"]["head.weight"].update(bits=5), "manifest.tensors.head.weight.bits is '5'"),
        (lambda m: m["tensors"]["head.weight"].update(shape=[61, -64]), "is damaged"),
        (lambda m: m["tensors"]["ln_out.weight"].update(block=32), "ln_out.weight of shape (64,) is in blocks"),
        (lambda m: m["tensors"]["head.weight"].update(scales=None), "which takes a matrix and scales"),
        (lambda m: m.update(graphs=[]), "is damaged: it has no graphs"),
        (lambda m: m["graphs"][0].update(T="x"), "manifest.graphs[0].T is 'x'"),
    ],
)
def test_manifests_that_lie_are_refused(change, message, copy):
    path = copy(quant="int4")
    edit(path, change)
    with pytest.raises(BundleError) as e:
        open_bundle(path)
    assert message in str(e.value)


TABLE = "blocks.1.ffn.s_emb.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tensors"][TABLE].update(shape=[30, 1024]), "its tables are not of 61 rows of one width"),
        (lambda m: m["tensors"][TABLE].update(shape=[61, 1023]), "its tables are not of 61 rows of one width"),
        (lambda m: m["tensors"]["ln_out.weight"].update(kind="table"), "its tables are not of 61 rows of one width"),
        (lambda m: m["tensors"][TABLE].update(kind="matrix"), "the tables are not what model.onnx takes"),
        (lambda m: m["graphs"][0]["inputs"][2].update(shape=[]), "the tables are not what model.onnx takes"),
    ],
)
def test_tables_that_lie_are_refused(change, message, copy):
    path = copy("v7a", quant="fp16")
    open_bundle(path)
    edit(path, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


def test_folders_that_are_no_bundles(tmp_path):
    with pytest.raises(BundleError, match=r"none is not there: a bundle is a folder with a manifest\.json"):
        open_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match="is a file, and a bundle is a folder"):
        open_bundle(DEMO)
    with pytest.raises(BundleError, match=r"has no manifest\.json: it is not a bundle, or its export was interrupted"):
        open_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(BundleError, match="it states no format"):
        open_bundle(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        open_bundle(tmp_path)


LEAVES = st.none() | st.integers(-5, 2**65) | st.text(max_size=4) | st.floats() | st.just([]) | st.just({})


@settings(max_examples=150)
@given(data=st.data())
def test_an_edited_manifest_never_ends_in_a_traceback(data, bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("edited") / "b"
    shutil.copytree(bundle("odd", quant="int4"), path, copy_function=os.link)
    manifest = json.loads((path / "manifest.json").read_text())
    at = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.integers(0, 3)) == 0:
            break
        at = at[key]
    at[key] = data.draw(LEAVES)
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    try:
        open_bundle(path, verify=False, threads=1).feed([1, 2])
    except RwkvEdgeError as e:
        assert str(e)
    finally:
        shutil.rmtree(path)


# --- writing ---


def test_nothing_is_overwritten_unless_forced(tmp_path, random_pth):
    pth, out = random_pth("odd"), tmp_path / "out"
    export(pth, out)
    before = (out / "manifest.json").stat().st_mtime_ns
    with pytest.raises(OutputError, match=r"exists: choose another output \(-o\), or --force to replace it"):
        export(pth, out, quant="int8")
    assert (out / "manifest.json").stat().st_mtime_ns == before
    export(pth, out, quant="int8", force=True)
    assert read_bundle(out).manifest["tensors"]["head.weight"]["bits"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_never_removes_what_is_no_bundle(tmp_path, random_pth):
    pth = random_pth("odd")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(OutputError, match="is no bundle, so it will not be replaced"):
        export(pth, tmp_path / "thesis", force=True)
    with pytest.raises(OutputError, match="exists and is no folder"):
        export(pth, tmp_path / "thesis" / "chapter.txt", force=True)
    with pytest.raises(OutputError, match="is no regular file: choose another output"):
        quantize(pth, tmp_path / "thesis", force=True)
    with pytest.raises(OutputError, match="is not a folder: create it first"):
        export(pth, tmp_path / "nowhere" / "out")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    export(pth, tmp_path / "empty", force=True)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "My PWA", "files": {}}')
    with pytest.raises(OutputError, match="is no bundle, so it will not be replaced"):
        export(pth, tmp_path / "web", force=True)
    (tmp_path / "empty" / "chat.state").write_text("precious")
    with pytest.raises(OutputError, match=r"holds 'chat\.state', which is not the bundle's, so it will not be replaced"):
        export(pth, tmp_path / "empty", force=True)
    assert (tmp_path / "empty" / "chat.state").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_the_old_bundle_comes_back_if_the_exchange_fails(error, tmp_path, random_pth, monkeypatch):
    out = tmp_path / "out"
    export(random_pth("odd"), out)
    before = (out / "manifest.json").read_bytes()
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".part"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((OutputError, KeyboardInterrupt, SystemExit)):
        export(random_pth("odd"), out, quant="int8", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "manifest.json").read_bytes() == before


def test_nothing_of_the_old_bundle_is_left_by_an_interrupt(tmp_path, random_pth, monkeypatch):
    out = tmp_path / "out"
    export(random_pth("odd"), out)
    rmtree = shutil.rmtree

    def interrupted(path, *args, **options):
        if path.name.endswith(".old"):
            monkeypatch.setattr(shutil, "rmtree", rmtree)
            raise KeyboardInterrupt
        return rmtree(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(random_pth("odd"), out, quant="int8", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert read_bundle(out).manifest["tensors"]["head.weight"]["bits"] == 8


def test_the_root_is_no_output(random_pth):
    with pytest.raises(OutputError, match="/ cannot be replaced: choose another output"):
        export(random_pth("odd"), "/", force=True)


def test_a_link_to_a_bundle_stays_a_link(tmp_path, random_pth):
    export(random_pth("odd"), tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    export(random_pth("odd"), tmp_path / "link", quant="int8", force=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]
    assert read_bundle(tmp_path / "real").manifest["tensors"]["head.weight"]["bits"] == 8


def test_what_appears_meanwhile_is_not_replaced(tmp_path, random_pth):
    out = tmp_path / "out"

    def meanwhile(done, total):
        if not out.exists():
            out.mkdir()
            (out / "precious").write_text("precious")

    with pytest.raises(OutputError, match="exists: choose another output"):
        export(random_pth("odd"), out, progress=meanwhile)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "precious").read_text() == "precious"


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_a_full_disk_leaves_nothing(command, tmp_path):
    """A real limit on file size, in a real process."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    run = subprocess.run(
        [sys.executable, "-m", "rwkv_edge", command, DEMO, "-o", tmp_path / "out", "--quant", "int8"],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"Error: cannot write {tmp_path / 'out'}: File too large\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(sent, code, tmp_path):
    shape = dict(n_layer=2, n_head=8, head_size=64, n_ffn=2048, n_vocab=20000, ranks=(32, 32, 32, 64), layer0_v=False)
    pth = factory.write_pth(tmp_path / "model.pth", factory.weights(**shape))
    process = subprocess.Popen([sys.executable, "-m", "rwkv_edge", "export", pth, "--quant", "int4"], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".model-int4*/weights.bin")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None, "the export ended before it could be interrupted"
    process.send_signal(sent)
    assert process.wait(60) == code
    process.stderr.close()
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def test_float16_cannot_hold_everything(tmp_path):
    w = factory.weights(**factory.SHAPES["odd"])
    w["head.weight"][3, 5] = 1e5
    pth = factory.write_pth(tmp_path / "m.pth", w, "fp32")
    with pytest.raises(QuantizeError, match=r"head\.weight: 100000 is beyond float16: use --override 'head\.weight=32'"):
        export(pth, tmp_path / "out", quant="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_float16_is_not_taken_for_weights_it_loses(tmp_path):
    w = factory.weights(**factory.SHAPES["odd"])
    w["blocks.0.att.key.weight"] *= 1e-7
    pth = factory.write_pth(tmp_path / "m.pth", w, "fp32")
    with pytest.raises(QuantizeError, match=r"blocks\.0\.att\.key\.weight: the numbers are too small for float16"):
        export(pth, tmp_path / "out", quant="fp16")
    export(pth, tmp_path / "out", quant="fp16", overrides=["blocks.0.att.key.weight=32"])


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    w = factory.weights(**factory.SHAPES["odd"])
    w["blocks.1.att.w2"][2, 1] = float("inf")
    pth = factory.write_pth(tmp_path / "m.pth", w, "fp32")
    for quant in ("none", "int4"):
        with pytest.raises(CheckpointError, match=r"blocks\.1\.att\.w2 holds a inf at \[1, 2\]"):
            export(pth, tmp_path / "out", quant=quant)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, random_pth):
    tokenizer = DEMO.with_name("tokenizer.json")
    with pytest.raises(InputError, match="has 4096 tokens, but the model has 61: it belongs to another model"):
        export(random_pth("odd"), tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(InputError, match="does not exist"):
        export(random_pth("odd"), tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["prompt"].update(user="User: \n\n"), "manifest.prompt.*'User: "),
        (lambda m: m["prompt"].update(user="{} {}"), "manifest.prompt"),
        (lambda m: m["prompt"].update(stop=[""]), "manifest.prompt"),
        (lambda m: m["prompt"]["think"].pop("none"), "no way of thinking called 'none'"),
        (lambda m: m["prompt"]["think"]["fast"]["sampling"].update(temperature=-1), "manifest.prompt"),
        (lambda m: m["prompt"].update(assistant="\ud800"), "surrogates not allowed"),
        (lambda m: m["prompt"].pop("stop"), "manifest.prompt has no 'stop'"),
        (lambda m: m["sampling"].pop("top_k"), "manifest.sampling has no 'top_k'"),
        (lambda m: m["sampling"].update(top_q=1), "manifest.sampling has 'top_q', which is unknown"),
        (lambda m: m["sampling"].update(top_p=0), "manifest.sampling.top_p is '0'"),
        (lambda m: m["tokenizer"].update(eos_token_ids=[0, 4096]), "token 4096 ends or begins a text, and there are 4096"),
        (lambda m: m["tokenizer"].update(bos_token_id=4096), "token 4096 ends or begins a text, and there are 4096"),
        (lambda m: m["prompt"].update(blank_lines="fold"), "manifest.prompt.blank_lines is 'fold'"),
    ],
)
def test_a_damaged_template_is_the_bundle_s_fault(change, message, copy):
    path = copy("demo", quant="none", template="rwkv")
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        read_bundle(path)


def test_a_model_of_world_s_size_gets_its_tokenizer_and_its_roles(bundle, model, tmp_path, random_pth):
    """Without a word, as the official checkpoints come; and nothing is chosen that is no token."""
    path = bundle("world", quant="int4")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["tokenizer"] == {"kind": "world", "file": "rwkv_vocab.txt", "eos_token_ids": [0], "bos_token_id": 0}
    assert (path / "rwkv_vocab.txt").read_bytes() == WORLD.read_bytes()
    assert manifest["prompt"] == TEMPLATES["rwkv"]
    m = model("world", quant="int4")
    assert m.decode(m.encode("Hello, 世界!")) == "Hello, 世界!"
    only = {"logits": lambda logits, ids: np.where(np.arange(65536) >= 65529, logits, -np.inf)}
    assert {t.id for t in m.generate("Hi", max_tokens=5, **only)} == {65529}
    unused = dict.fromkeys(range(65530, 65536), 10000)
    assert max(t.id for t in m.generate("Hi", max_tokens=20, temperature=2, top_p=1, seed=1, bias=unused)) < 65530
    assert isinstance("".join(Chat(m, max_tokens=3, seed=1).say("Hi")), str)
    export(random_pth("world"), tmp_path / "given", tokenizer=WORLD, template="none", quant="int4")
    manifest = json.loads((tmp_path / "given" / "manifest.json").read_text())
    assert (manifest["tokenizer"]["kind"], manifest["prompt"]) == ("world", None)


def test_a_quantized_checkpoint_gives_the_same_bundle(tmp_path, bundle):
    quantize(DEMO, tmp_path / "q.safetensors", quant="int4", block=64, overrides=["head.weight=8"])
    tokenizer = DEMO.with_name("tokenizer.json")
    export(tmp_path / "q.safetensors", tmp_path / "two-steps", tokenizer=tokenizer)
    at_once = bundle("demo", quant="int4", block=64, overrides=("head.weight=8",))
    for file in at_once.iterdir():
        assert file.read_bytes() == (tmp_path / "two-steps" / file.name).read_bytes(), file.name
    with pytest.raises(
        QuantizeError, match="is quantized already: give the original checkpoint, or leave --quant, --block and --override out"
    ):
        export(tmp_path / "q.safetensors", tmp_path / "again", quant="int8")
    with pytest.raises(QuantizeError, match="is quantized already"):
        quantize(tmp_path / "q.safetensors", tmp_path / "again")


# --- check ---


def test_check_holds_for_every_width(bundle):
    report = check_bundle(bundle("demo", quant="int4"), DEMO)
    assert report.ok
    assert [(r.file, r.arithmetic) for r in report.rows[::2]] == [("model.onnx", "int8 activations"), ("exact.onnx", "exact")]
    assert max(r.own.max_abs for r in report.rows if r.arithmetic == "exact") <= 1e-4
    assert report.rounding.max_abs <= 1e-4
    assert report.weights.kl == pytest.approx(report.rows[-1].cost.kl, rel=1e-3)
    assert 0.005 < report.weights.kl < 0.05
    same = check_bundle(bundle("demo", quant="none"), DEMO)
    assert same.ok
    assert same.weights.max_abs == 0


def test_check_knows_that_deep_models_stray(tmp_path):
    """32 random layers amplify float32's rounding a thousandfold: no fault of the graph."""
    shape = dict(n_layer=32, n_head=2, head_size=64, n_ffn=512, n_vocab=200, ranks=(16, 16, 16, 16), layer0_v=False)
    export(factory.write_pth(tmp_path / "m.pth", factory.weights(**shape)), tmp_path / "out", quant="int8")
    assert check_bundle(tmp_path / "out", n_tokens=80).ok


def test_check_refuses_another_model_s_checkpoint(bundle, random_pth):
    with pytest.raises(CheckpointError, match="is another model"):
        check_bundle(bundle("demo", quant="int4"), random_pth("odd"))
    quantize(DEMO, bundle("demo", quant="int4").parent / "again.safetensors", force=True)
    with pytest.raises(CheckpointError, match="is quantized itself: give the original checkpoint"):
        check_bundle(bundle("demo", quant="int4"), bundle("demo", quant="int4").parent / "again.safetensors")
    with pytest.raises(InputError, match="1 tokens cannot be compared: expected 2 to 65536"):
        check_bundle(bundle("demo", quant="int4"), n_tokens=1)


def rehash(path):
    from rwkv_edge.bundle import sha256_of

    edit(path, lambda m: [a.update(bytes=(path / n).stat().st_size, sha256=sha256_of(path / n)) for n, a in m["files"].items()])


def first(graph, op, n=0):
    return [node for node in graph.node if node.op_type == op][n]


def swap_inputs(node):
    node.input[0], node.input[1] = node.input[1], node.input[0]


def attribute(node, name):
    return next(a for a in node.attribute if a.name == name)


def swap_outputs(graph, a, b):
    for node in graph.node:
        node.output[:] = [{a: b, b: a}.get(o, o) for o in node.output]
        node.input[:] = [{a: b, b: a}.get(o, o) for o in node.input]


def add_to(graph, name, delta):
    """Change a small constant of the graph."""
    t = next(t for t in graph.initializer if t.name == name)
    x = onnx.numpy_helper.to_array(t) + delta
    t.CopyFrom(onnx.numpy_helper.from_array(x.astype("float32"), name))


def move(graph, name, offset):
    t = next(t for t in graph.initializer if t.name == name)
    entry = next(e for e in t.external_data if e.key == "offset")
    entry.value = str(int(entry.value) + offset)


def exchange(graph, one, two):
    a, b = (next(t for t in graph.initializer if t.name == n) for n in (one, two))
    x, y = list(a.external_data), list(b.external_data)
    x, y = [type(e).FromString(e.SerializeToString()) for e in x], [type(e).FromString(e.SerializeToString()) for e in y]
    del a.external_data[:], b.external_data[:]
    a.external_data.extend(y)
    b.external_data.extend(x)


FAULTS = {
    "lerp looks the wrong way": lambda g: swap_inputs(first(g, "Sub")),
    "v residual the wrong way": lambda g: swap_inputs(first(g, "Sub", 4)),
    "epsilon of the head norm": lambda g: attribute(
        next(n for n in g.node if n.op_type == "LayerNormalization" and "ln_x" in n.input[1]), "epsilon"
    ).__setattr__("f", 1e-3),
    "scales of another place": lambda g: move(g, "blocks.1.att.key.weight.scales", -256),
    "codes of another matrix": lambda g: exchange(g, "blocks.0.att.key.weight", "blocks.0.att.value.weight"),
    "mu one vector too far": lambda g: move(g, "blocks.1.att.x_r+5", 256),
    "state of the other layer": lambda g: swap_outputs(g, "state.0.att_x.out", "state.1.att_x.out"),
    "memory of the other layer": lambda g: swap_outputs(g, "state.0.wkv.out", "state.1.wkv.out"),
    "decay a little faster": lambda g: add_to(g, "F32[][-0.6065306597126334]", -0.02),
    "beta of the erase": lambda g: add_to(g, f"F32[1, 1, 2][1.0, {2.0**-44}]", -0.1),
    "scale of the query": lambda g: attribute(first(g, "LinearAttention"), "scale").__setattr__("f", 0.1),
    "tanh dropped": lambda g: first(g, "Tanh").__setattr__("op_type", "Identity"),
    "sigmoid of the gate dropped": lambda g: first(g, "Sigmoid", 2).__setattr__("op_type", "Tanh"),
    "logits of the token before": lambda g: first(g, "Gather").__setattr__("op_type", "GatherElements"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", ["model.onnx", "exact.onnx"])
def test_check_sees_planted_faults(fault, file, copy):
    path = copy("odd", quant="int8")
    graph = onnx.load(str(path / file), load_external_data=False)
    before = graph.SerializeToString()
    FAULTS[fault](graph.graph)
    assert graph.SerializeToString() != before
    (path / file).write_bytes(graph.SerializeToString())
    rehash(path)
    try:
        report = check_bundle(path)
    except RwkvEdgeError:
        return  # onnxruntime refuses the graph, or its logits are not finite
    bad = {row.file for row in report.rows if not row.ok}
    assert file in bad
    with pytest.raises(CheckFailed, match="does not compute the bundle's weights"):
        report.raise_if_failed()


def test_check_reads_the_weights_from_disk(copy):
    """The table says where the weights are; a graph that reads others is caught."""
    path = copy("odd", quant="int4")

    def exchange_places(m):
        a, b = (m["tensors"][f"blocks.0.att.{n}.weight"] for n in ("key", "value"))
        a["offset"], b["offset"] = b["offset"], a["offset"]

    edit(path, exchange_places)
    assert not check_bundle(path).ok
