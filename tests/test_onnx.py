"""Exported graphs: numpy = onnxruntime for every form and width, valid ONNX, the same bytes every time."""

import itertools
import subprocess
import sys

import factory
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import DEMO, GRAPH, GRAPH_STATE, INT8_RMS, apart

from rwkv_edge.bundle import read_bundle
from rwkv_edge.convert import export
from rwkv_edge.errors import ExportError, QuantizeError
from rwkv_edge.reference import Weights, run_reference

WIDTHS = [
    {"quant": "none"},
    {"quant": "fp16"},
    {"quant": "int8"},
    {"quant": "int4"},
    {"quant": "int4", "block": 128},
    {"quant": "int8", "block": 256},
    {"quant": "int4", "block": 16, "overrides": ("head.weight=8:64", "blocks.1.*=32", "emb.weight=16")},
]
FORMS = ["attention", "plain", "step"]


@pytest.mark.parametrize("wkv", FORMS)
@pytest.mark.parametrize("options", WIDTHS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("name", ["demo", *factory.SHAPES])
def test_graph_equals_numpy_on_the_weights_on_disk(name, options, wkv, model, bundle):
    exact = "run" if options["quant"] in ("none", "fp16") else "exact"
    path = bundle(name, wkv=wkv, **options)
    b = read_bundle(path)
    ids = factory.tokens(90, b.spec.n_vocab)
    expected, end = run_reference(b.spec, Weights(b.tensors), ids)
    m = model(name, role=exact, wkv=wkv, **options)
    for cuts in ([90], [1, 1, 37, 51]):
        parts, state, at = [], None, 0
        for n in cuts:
            logits, state = m.feed(ids[at : at + n], state, every=True)
            parts.append(logits)
            at += n
        assert apart(np.concatenate(parts), expected) <= GRAPH
        assert max(apart(state.tensors[n], x) for n, x in end.items()) <= GRAPH_STATE
    if exact == "exact":
        logits, _ = model(name, wkv=wkv, **options).feed(ids, every=True)
        assert np.sqrt(np.mean((logits - expected) ** 2)) / expected.std() <= INT8_RMS


@pytest.mark.parametrize("wkv", ["attention", "plain"])
def test_greedy_text_is_the_reference_s_token_for_token(wkv, model, weights):
    m = model("demo", quant="none", wkv=wkv)
    spec, W = weights("demo")
    prompt = m.encode("Once upon a time")
    ids, state = list(prompt), None
    logits, state = run_reference(spec, W, prompt)
    for _ in range(200):
        ids.append(int(logits[-1].argmax()))
        logits, state = run_reference(spec, W, ids[-1:], state)
    expected = ids[len(prompt) :]
    assert [t.id for t in m.generate(prompt, max_tokens=200, temperature=0)] == expected
    for cuts in ([len(ids)], [1] * len(ids), [7] * 30):
        at, state, choices = 0, None, []
        for n in cuts:
            if at < len(ids):
                every, state = m.feed(ids[at : at + n], state, every=True)
                choices += every.argmax(-1).tolist()
                at += n
        assert choices[len(prompt) - 1 : -1] == expected


@pytest.mark.parametrize("wkv", FORMS)
@pytest.mark.parametrize("quant", ["none", "fp16", "int4"])
def test_files_are_valid_onnx(quant, wkv, bundle):
    path = bundle("odd", quant=quant, wkv=wkv)
    for graph in read_bundle(path).manifest["graphs"]:
        onnx.checker.check_model(str(path / graph["file"]))
        loaded = onnx.load(str(path / graph["file"]), load_external_data=False)
        assert not {"Loop", "Scan", "If"} & {n.op_type for n in loaded.graph.node}
        assert {i.name for i in loaded.graph.input} == {i["name"] for i in graph["inputs"]}
        assert {o.name for o in loaded.graph.output} == {o["name"] for o in graph["outputs"]}
        if wkv != "attention":
            assert "LinearAttention" not in {n.op_type for n in loaded.graph.node}


def test_run_and_exact_differ_in_the_accuracy_level_only(bundle):
    path = bundle("odd", quant="int4")
    graphs = [onnx.load(str(path / f), load_external_data=False).graph for f in ("model.onnx", "exact.onnx")]
    levels = []
    for graph in graphs:
        levels.append({a.i for n in graph.node for a in n.attribute if a.name == "accuracy_level"})
        for n in graph.node:
            for a in [a for a in n.attribute if a.name == "accuracy_level"]:
                n.attribute.remove(a)
    assert levels == [{4}, {0}]
    assert graphs[0] == graphs[1]


def test_matmulnbits_reads_what_we_pack(bundle):
    """Operation by operation: onnxruntime's own dequantization against ours."""
    b = read_bundle(bundle("odd", quant="int4", block=16))
    for name in ("blocks.0.att.key.weight", "blocks.1.att.w2", "head.weight"):
        q = b.tensors[name].read()
        n_out, n_in = q.shape
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=n_in, N=n_out, bits=q.bits, block_size=q.block
        )
        graph = onnx.helper.make_graph(
            [node],
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, [n_in, n_in])],
            [onnx.helper.make_tensor_value_info("y", 1, [n_in, n_out])],
            [onnx.numpy_helper.from_array(q.pack(), "b"), onnx.numpy_helper.from_array(q.scales, "s")],
        )
        opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        (y,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.eye(n_in, dtype=np.float32)})
        np.testing.assert_array_equal(y.T, q.dequantize())


def test_level_four_rounds_activations_to_eight_bits_by_block(bundle):
    """What the run graph adds, operation by operation: scale absmax / 127 for every block of a row."""
    b = read_bundle(bundle("odd", quant="int4", block=32))
    q = b.tensors["blocks.0.ffn.value.weight"].read()
    n_out, n_in = q.shape
    x = factory.uniform("x", (1, n_in))
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    expected = (np.round(blocks / scale) * scale).reshape(1, -1).astype(np.float64) @ q.dequantize().T.astype(np.float64)
    attributes = {"K": n_in, "N": n_out, "bits": 4, "block_size": 32, "accuracy_level": 4}
    node = onnx.helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, n_in])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, n_out])],
        [onnx.numpy_helper.from_array(q.pack(), "b"), onnx.numpy_helper.from_array(q.scales, "s")],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (y,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    exact = x.astype(np.float64) @ q.dequantize().T.astype(np.float64)
    rounding = np.abs(expected - exact).max()
    # not every CPU has the 8-bit kernel; where it is missing the product is exact
    assert min(np.abs(y - expected).max(), np.abs(y - exact).max()) <= 0.01 * rounding


def test_same_bytes_in_any_process(tmp_path, bundle):
    here = bundle("demo", quant="int4")
    code = f"from rwkv_edge import export; export({str(DEMO)!r}, {str(tmp_path / 'again')!r}, quant='int4')"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "123"})
    files = sorted(p.name for p in here.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in files:
        assert (here / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_container_does_not_matter(tmp_path):
    w = factory.weights(**factory.SHAPES["odd"])
    pth = factory.write_pth(tmp_path / "a.pth", dict(sorted(w.items(), reverse=True)), "bf16")
    st = factory.write_safetensors(tmp_path / "b.safetensors", w, "BF16")
    one, two = export(pth, tmp_path / "one", quant="int4"), export(st, tmp_path / "two", quant="int4")
    assert one.model_id == two.model_id
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_one_model_has_one_id_at_any_width(bundle):
    ids = {read_bundle(bundle("odd", **o)).model_id for o in WIDTHS}
    assert len(ids) == 1
    assert read_bundle(bundle("plain", quant="none")).model_id not in ids


def test_weights_are_aligned_and_do_not_overlap(bundle):
    b = read_bundle(bundle("odd", quant="int4"))
    places = []
    for t in b.manifest["tensors"].values():
        places.append((t["offset"], t["bytes"]))
        if t["scales"]:
            places.append((t["scales"]["offset"], t["scales"]["bytes"]))
    places.sort()
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(places))
    assert all(at % 4096 == 0 for at, n in places if n >= 4096)


def test_options_that_do_not_exist_are_refused(tmp_path, random_pth):
    with pytest.raises(ExportError, match=r"wkv 'loop' is unknown: expected one of attention, plain, step"):
        export(random_pth("odd"), tmp_path / "x", wkv="loop")
    with pytest.raises(QuantizeError, match="quant 'int3' is unknown: expected one of none, fp16, int8, int4"):
        export(random_pth("odd"), tmp_path / "x", quant="int3")
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from rwkv_edge import export, RwkvEdgeError\n"
        f"try: export({str(DEMO)!r}, {str(tmp_path / 'x')!r})\n"
        "except RwkvEdgeError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "exporting needs the onnx package: pip install 'rwkv-edge[export]'\n"
    assert not list(tmp_path.iterdir())
