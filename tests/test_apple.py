"""What of apple/ can be tested without a Mac: the goldens' script, and on_a_mac.py up to Core ML itself."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from rwkv_edge import export
from rwkv_edge.tokenizer import WORLD

APPLE = Path(__file__).parent.parent / "apple"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, APPLE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mac, goldens = _script("on_a_mac"), _script("make_goldens")


def test_the_goldens_of_the_tokenizers_are_those_that_the_script_makes():
    world = goldens.tokenizer_goldens(WORLD, also=goldens.BROKEN)
    assert json.loads((goldens.GOLDENS / "world.json").read_text()) == world
    demo = goldens.tokenizer_goldens(goldens.DEMO_TOKENIZER, also=[])
    assert json.loads((goldens.GOLDENS / "tokenizer.json").read_text()) == demo


def test_the_goldens_of_the_state_are_those_that_the_script_makes(tmp_path, monkeypatch):
    committed = goldens.GOLDENS
    monkeypatch.setattr(goldens, "GOLDENS", tmp_path)
    assert goldens.state_golden() == json.loads((committed / "half.json").read_text())
    assert (tmp_path / "half.state").read_bytes() == (committed / "half.state").read_bytes()


def test_the_golden_of_a_model_is_the_one_that_the_script_makes(tmp_path):
    bundle = tmp_path / "ane-lut4"
    export(goldens.DEMO, bundle, target="coreml", **goldens.BUNDLES["ane-lut4"])
    found, expected = goldens.model_goldens(bundle), json.loads((goldens.GOLDENS / "ane-lut4.json").read_text())
    assert {**found, "steps": 0, "state": 0, "deviation": 0} == {**expected, "steps": 0, "state": 0, "deviation": 0}
    assert found["deviation"] == pytest.approx(expected["deviation"], abs=0.02)
    assert [s["argmax"] for s in found["steps"]] == [s["argmax"] for s in expected["steps"]]
    for one, other in zip(found["steps"], expected["steps"], strict=True):
        assert one["logits"] == pytest.approx(other["logits"], abs=0.02)
    one, other = found["state"], expected["state"]
    assert one["n_tokens"] == other["n_tokens"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        assert tensor["shape"] == other["tensors"][name]["shape"]
        assert tensor["values"] == pytest.approx(other["tensors"][name]["values"], abs=0.02)


# --- a made-up model: two layers, whose state is a running sum; the logits are of the sums and the token ---

V, C = 5, 2


def _manifest(*, packed: bool, parts: int) -> dict:
    """The manifest of the made-up model, as coreml export writes it, in one package or in one a layer."""
    graphs = []
    layers = [[0, 1]] if parts == 1 else [[0], [1]]
    for part, owned in enumerate(layers, start=1):
        states = [] if packed else [{"name": f"state_{i}_att_x", "dtype": "float16", "shape": [1, 1, 1, C]} for i in owned]
        for function, n in (("decode", 1), ("prefill", 4)):
            tokens = {"name": "tokens", "dtype": "int32", "shape": [n]}
            hidden = {"name": "hidden", "dtype": "float16", "shape": [1, 1, 1, C]}
            last = {"name": "logits", "dtype": "float16", "shape": [1, V]}
            graph = {
                "file": "model.mlpackage" if parts == 1 else f"part-{part}.mlpackage",
                "function": function,
                "role": function,
                "part": part,
                "parts": parts,
                "target": "coreml",
                "profile": "ane",
                "T": n,
                "state": "packed" if packed else "explicit",
                "inputs": [tokens if part == 1 else hidden, *states],
                "outputs": [
                    last if part == len(layers) else hidden | {"name": "hidden_out"},
                    *(s | {"name": f"{s['name']}_out"} for s in states),
                ],
            }
            if packed:
                rows = {"att_x": [0, 1]}
                graph["packed"] = {"name": "rwkv_state", "shape": [len(owned), 1, C], "first_layer": owned[0], "rows": rows}
            graphs.append(graph)
    state = [{"name": f"{i}.att_x", "shape": [C], "dtype": "float32", "first": 0.5, "factor": 1.0} for i in range(2)]
    spec = {"version": "7", "n_vocab": V}
    return {"format": 1, "model_id": "5" * 64, "spec": spec, "state": state, "graphs": graphs, "files": {}}


class _State:
    """As coremltools.models.model.MLState."""

    def __init__(self, shape):
        self.array = np.full(shape, np.nan)

    def write_state(self, name, value):
        assert name == "rwkv_state"
        assert value.dtype == np.float32
        self.array[:] = value

    def read_state(self, name):
        assert name == "rwkv_state"
        return self.array


class _Package:
    """As coremltools' MLModel: one function of one package of the made-up model."""

    def __init__(self, graph):
        self._graph = graph
        n = len([i for i in graph["inputs"] if i["name"].startswith("state_")])
        self._packed = graph.get("packed")
        self._first = int(graph["inputs"][-1]["name"].split("_")[1]) - n + 1 if n else (self._packed or {})["first_layer"]
        self._n = n or self._packed["shape"][0]

    def make_state(self):
        return _State(self._packed["shape"])

    def predict(self, inputs, state=None):
        assert set(inputs) == {i["name"] for i in self._graph["inputs"]}
        for i in self._graph["inputs"]:
            assert list(inputs[i["name"]].shape) == i["shape"]
        outputs = {}
        if "tokens" in inputs:
            assert inputs["tokens"].dtype == np.int32
            x = np.array([inputs["tokens"].sum(), inputs["tokens"].size], np.float64)
        else:
            x = inputs["hidden"].reshape(-1).astype(np.float64)
        for k in range(self._n):
            name = f"state_{self._first + k}_att_x"
            before = state.array[k, 0] if self._packed else inputs[name].reshape(-1)
            after = before + x
            if self._packed:
                state.array[k, 0] = after
            else:
                outputs[f"{name}_out"] = after.reshape(1, 1, 1, C)
            x = x + after
        name = self._graph["outputs"][0]["name"]
        value = np.outer(np.arange(V), x).sum(1)[None] if name == "logits" else x.reshape(1, 1, 1, C)
        return {name: value, **outputs}


def _load(manifest):
    programs = []
    for part in mac.parts_of(manifest):
        models = {function: _Package(graph) for function, graph in part.functions.items()}
        if part.packed:
            programs.append(mac._with_state(part, models, mac.first_values(manifest)))
        else:
            programs.append(mac.Program(part, {f: m.predict for f, m in models.items()}, lambda: None))
    return programs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_loop_of_the_mac_script_hands_the_state_on(packed, parts):
    manifest = _manifest(packed=packed, parts=parts)
    loop = mac.Loop(_load(manifest), manifest)
    prompt = [1, 2, 3, 4, 3, 2]  # a chunk and two more
    found = mac.trajectory(loop, prompt, [1, 4])
    s0, s1, rows = np.full(C, 0.5), np.full(C, 0.5), []
    for chunk in ([1, 2, 3, 4], [3], [2], [1], [4]):
        x = np.array([sum(chunk), len(chunk)], np.float64)
        s0 = s0 + x
        x = x + s0
        s1 = s1 + x
        x = x + s1
        rows.append(np.outer(np.arange(V), x).sum(1))
    np.testing.assert_allclose(found, rows[2:])
    np.testing.assert_allclose(mac.trajectory(loop, prompt, [1, 4]), found)  # from the beginning again


def test_first_values_of_both_layouts():
    manifest = _manifest(packed=True, parts=2)
    manifest["state"][1] |= {"first": -160000.0, "factor": 16.0}
    first = mac.first_values(manifest)
    second = mac.parts_of(manifest)[1].packed
    np.testing.assert_array_equal(mac.first_packed(second, first), np.full((1, 1, C), -10000.0))
    explicit = mac.parts_of(_manifest(packed=False, parts=1))[0]
    assert {name: x.flat[0] for name, x in mac.first_inputs(explicit, first).items()} == {
        "state_0_att_x": 0.5,
        "state_1_att_x": -10000.0,
    }


def test_elsewhere_the_mac_script_stops_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(mac.platform, "system", lambda: "Linux")
    assert mac.main(["bundle"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "on_a_mac.py: this needs a Mac with macOS 15 or newer: here is Linux, where Core ML cannot run\n"
    with pytest.raises(mac.MacError, match=r"here is 14\.5"):
        mac.refuse_elsewhere("Darwin", "14.5")
    mac.refuse_elsewhere("Darwin", "15.0")


def test_what_the_mac_script_is_given_is_read_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mac.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(mac.platform, "mac_ver", lambda: ("15.1", (), ""))
    monkeypatch.setattr(mac, "report", lambda *given: pytest.fail("it began"))
    file = tmp_path / "file.json"
    for content in (None, "[", "[]", "{}", '{"ids": [1], "steps": [], "model_id": "x", "deviation": 1}'):
        if content is not None:
            file.write_text(content)
        assert mac.main(["bundle", "--golden", str(file)]) == 1
        assert f"on_a_mac.py: {file} is no golden file of a model: " in (err := capsys.readouterr().err)
        assert err.count("\n") == 1
    assert mac.main(["bundle", "--json", str(tmp_path / "none" / "x.json")]) == 1
    assert "No such file" in capsys.readouterr().err
    for bad in ("nan", "-1", "x"):
        with pytest.raises(SystemExit):
            mac.main(["bundle", "--tolerance", bad])
        assert f"invalid tolerance value: '{bad}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"graphs": [{"target": "onnx"}]}, "not exported for Core ML"),
        ({"graphs": [{"target": "coreml", "inputs": [{"name": "deep_embed"}]}]}, "7a"),
    ],
)
def test_what_the_mac_script_cannot_run_it_refuses(tmp_path, change, message):
    (tmp_path / "manifest.json").write_text(json.dumps(_manifest(packed=False, parts=1) | change))
    with pytest.raises(mac.MacError, match=message):
        mac.read_manifest(tmp_path)


def test_a_part_without_a_function_is_refused():
    manifest = _manifest(packed=False, parts=1)
    del manifest["graphs"][1]
    with pytest.raises(mac.MacError, match="expected decode and prefill"):
        mac.parts_of(manifest)


def test_comparisons():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(3, 50))
    same = mac.compare(a, a)
    assert same == {"max_difference": 0.0, "kl": pytest.approx(0, abs=1e-12), "same_top_choice": 1.0}
    b = a.copy()
    b[1, 7] += 1
    other = mac.compare(b, a)
    assert other["max_difference"] == pytest.approx(1 / a.std())
    assert other["kl"] > 0
    steps = [{"argmax": int(row.argmax()), "logits": row[:8].tolist()} for row in a]
    golden = {"steps": steps, "deviation": 2.0}
    assert mac.compare_golden(a, golden) == {"max_difference": 0.0, "same_top_choice": 1.0}
    assert mac.compare_golden(b, golden)["max_difference"] == pytest.approx(0.5)


def test_counts_of_devices():
    def op(name, blocks=()):
        return SimpleNamespace(operator_name=f"ios18.{name}", blocks=blocks)

    inner = SimpleNamespace(operations=[op("add")])
    block = SimpleNamespace(operations=[op("const"), op("constexpr_lut_to_dense"), op("conv"), op("conv"), op("cond", [inner])])
    devices = {
        "conv": type("MLNeuralEngineComputeDevice", (), {})(),
        "add": type("MLCPUComputeDevice", (), {})(),
    }

    def usage(operation):
        device = devices.get(operation.operator_name.split(".")[-1])
        return device and SimpleNamespace(preferred_compute_device=device)

    assert mac.count_devices(mac.operations(block), usage) == {
        "NeuralEngine": {"conv": 2},
        "unknown": {"cond": 1},
        "CPU": {"add": 1},
    }


def test_the_report_and_its_verdict(tmp_path, monkeypatch):
    manifest = _manifest(packed=False, parts=2)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    ok = {"package": "model.mlpackage", "ok": True, "seconds": 1.0, "output": "warning: something", "compiled": "x"}
    monkeypatch.setattr(mac, "compile_package", lambda package, folder: ok | {"package": package.name})
    monkeypatch.setattr(mac, "placement", lambda compiled, units: {"decode": {"CPU": {"conv": 3}}})
    monkeypatch.setattr(mac, "TOKENS", [1, 2, 3, 4, 3])

    def load(bundle, parts, manifest, units):
        if units == "CPU_AND_NE":
            raise RuntimeError("no such engine")
        return _load(manifest)

    monkeypatch.setattr(mac, "load", load)
    said = []
    found = mac.report(tmp_path, None, ["CPU_ONLY", "ALL"], said.append)
    assert mac.verdict(found, 0.05) == 0
    assert found["units"]["ALL"]["against"]["CPU_ONLY"]["max_difference"] == 0
    json.dumps(found)
    assert "coremlcompiler part-2.mlpackage: ok in 1.0 s" in said
    assert "  part-1.mlpackage decode: 3 operations on CPU: conv 3" in said
    found["units"]["ALL"]["against"]["CPU_ONLY"]["max_difference"] = float("nan")
    assert mac.verdict(found, 0.05) == 3
    found = mac.report(tmp_path, None, ["CPU_ONLY", "CPU_AND_NE"], said.append)
    assert "CPU_AND_NE: FAILED: no such engine" in said
    assert mac.verdict(found, 0.05) == 1
    monkeypatch.setattr(mac, "placement", lambda compiled, units: {}["no plan"])
    found = mac.report(tmp_path, None, ["CPU_ONLY", "ALL"], said.append)
    assert said[-1] == "  where operations run, Core ML does not say: 'no plan'"
    assert found["units"]["ALL"]["against"]["CPU_ONLY"]["max_difference"] == 0
    assert mac.verdict(found, 0.05) == 0
    for profile, own in (("ane", "CPU_AND_NE"), ("gpu", "CPU_AND_GPU")):
        for graph in manifest["graphs"]:
            graph["profile"] = profile
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert list(mac.report(tmp_path, None, None, said.append)["units"]) == ["CPU_ONLY", "ALL", own]
    with pytest.raises(mac.MacError, match="another model"):
        mac.report(tmp_path, {"model_id": "6" * 64}, ["CPU_ONLY"], said.append)


def test_nothing_heavy_is_imported_before_it_is_needed():
    assert "coremltools" not in mac.__dict__
    assert not {"coremltools", "rwkv_edge"} & {name.split(".")[0] for name in mac.__dict__ if name in sys.modules}
