"""Core ML packages: what the file on disk computes, read by our interpreter, is the step; planted faults are seen."""

import functools
import inspect
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import factory
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_bundle import SCHEMA

from rwkv_edge import mil
from rwkv_edge.bundle import MANIFEST, dump_manifest, read_bundle, sha256_of
from rwkv_edge.check import COREML_EXACT, check
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import cli
from rwkv_edge.convert import _calibration, export
from rwkv_edge.errors import BackendError, BundleError, CheckFailed, ExportError, InputError, QuantizeError, StateError
from rwkv_edge.evaluate import documents
from rwkv_edge.exporters import coreml
from rwkv_edge.qtensor import Lut, QTensor, Recipe, pack_bits, unpack_bits
from rwkv_edge.quantize import COREML_QUANTS, coreml_plan, kmeans, mean_squares, rtn, with_half_scales
from rwkv_edge.reference import Weights, run_reference
from rwkv_edge.runtime import State, open_bundle
from rwkv_edge.runtime.coreml import Interpreted
from rwkv_edge.texts import find_texts
from rwkv_edge.tokenizer import open_tokenizer

# float16 against float64 on the same weights, nats a token; measured 3e-6 on the demo model, 1e-5 to 3e-4 on random ones
NATIVE_KL = 1e-3
ROWS = [(profile, quant) for profile in COREML_QUANTS for quant in COREML_QUANTS[profile]]


def packages(path):
    return [path / f for f in dict.fromkeys(g["file"] for g in read_bundle(path).manifest["graphs"])]


@pytest.mark.parametrize(
    ("profile", "quant", "state"),
    [(p, q, "explicit") for p, q in ROWS] + [("ane", "fp16", "packed"), ("gpu", "fp16", "packed")],
)
@pytest.mark.parametrize("name", ["demo", *factory.SHAPES])
def test_the_file_computes_the_step(name, profile, quant, state, bundle):
    report = check(bundle(name, target="coreml", profile=profile, quant=quant, coreml_state=state), n_tokens=34)
    assert report.ok
    assert [row.arithmetic for row in report.rows] == ["exact", "exact", "native", "native"]
    for row in report.rows[:2]:
        assert max(row.own.max_abs, row.state) <= COREML_EXACT
    assert max(row.own.kl for row in report.rows[2:]) <= NATIVE_KL


@pytest.mark.parametrize("state", ["explicit", "packed"])
@pytest.mark.parametrize("profile", ["ane", "gpu"])
@pytest.mark.parametrize("name", ["demo", "v4", "v6", "v7a"])
def test_parts_compute_the_same(name, profile, state, bundle):
    path = bundle(name, target="coreml", profile=profile, quant="fp16", coreml_state=state, part_bytes=1)
    graphs = read_bundle(path).manifest["graphs"]
    assert len(packages(path)) == read_bundle(path).spec.n_layer + 1 == graphs[0]["parts"]
    passed = {o["name"] for g in graphs for o in g["outputs"] if not o["name"].startswith(("state_", "logits"))}
    assert passed == {"hidden_out"} | ({"v_first_out"} if read_bundle(path).spec.version.startswith("7") else set())
    report = check(path, n_tokens=33)
    assert report.ok
    assert max(row.own.max_abs for row in report.rows[:2]) <= COREML_EXACT


@pytest.mark.parametrize("profile", ["ane", "gpu"])
def test_a_large_vocabulary_is_cut_for_the_neural_engine(profile, bundle):
    path = bundle("world", target="coreml", profile=profile, quant="lut4")
    b = read_bundle(path)
    entries = b.manifest["tensors"]["head.weight"]
    assert [e["shape"][0] for e in entries] == ([16384] * 4 if profile == "ane" else [65536])
    assert b.tensors["head.weight"].read().shape == (65536, 16)
    assert check(path, n_tokens=18).ok


@pytest.mark.parametrize(
    ("name", "profile", "quant", "state"),
    [("odd", p, q, "packed" if q in ("lut4", "int4") else "explicit") for p, q in ROWS]
    + [(name, "ane", "lut6", "packed") for name in ("v4", "v5.2", "v6", "v7a")],
)
def test_coremltools_writes_the_same(name, profile, quant, state, bundle, tmp_path):
    """Read by coremltools, which infers every type anew, and written again by it: each operation, constant and weight."""
    path = packages(bundle(name, target="coreml", profile=profile, quant=quant, coreml_state=state))[0]
    ours, theirs = mil.Package(path), rewritten(path, tmp_path / "again")
    assert sorted_functions(theirs.model.description) == sorted_functions(ours.model.description)
    for role, function in ours.model.mlProgram.functions.items():
        other = theirs.model.mlProgram.functions[role]
        assert list(other.inputs) == list(function.inputs)
        a, b = (f.block_specializations[f.opset] for f in (function, other))
        assert (function.opset, list(a.outputs)) == (other.opset, list(b.outputs))
        for op, again in zip(a.operations, b.operations, strict=True):
            assert all(sanitized(o.name) == o.name for o in op.outputs)
            if op.type == "write_state":  # the one thing it names otherwise, and nothing refers to
                again.attributes["name"].CopyFrom(op.attributes["name"])
            for x, y in zip(values_of(op), values_of(again), strict=True):
                assert x.type == y.type
                np.testing.assert_array_equal(ours.value(x), theirs.value(y))
                for value in (x, y):  # wherever it lies: it puts fewer than 10 numbers into the graph
                    value.ClearField("immediateValue")
                    value.ClearField("blobFileValue")
            assert op == again


def rewritten(path, folder):
    """A package that coremltools has read and written, without a pass of its own in between."""
    mil.messages()
    with mil.quiet():
        from coremltools.converters.mil.backend.mil.load import load as write
        from coremltools.converters.mil.frontend.milproto.load import load as read

        package, weights = mil.Package(path), folder / mil.WEIGHTS
        program = read(package.model, specification_version=9, file_weights_dir=str((path / mil.WEIGHTS).parent))
        program.export_as_multifunction, program.default_function_name = True, "decode"
        weights.parent.mkdir(parents=True)
        model = write(program, str(weights.parent), specification_version=9, convert_to="mlprogram", convert_from="milproto")
    (folder / mil.MODEL).write_bytes(model.SerializeToString())
    return mil.Package(folder)


def sorted_functions(description):
    return sorted(description.functions, key=lambda f: f.name), description.defaultFunctionName


def values_of(op):
    """The constants in an operation: its attributes, and arguments that are no names."""
    yield from (value for _, value in sorted(op.attributes.items()))
    for _, argument in sorted(op.inputs.items()):
        yield from (a.value for a in argument.arguments if a.WhichOneof("binding") == "value")


def sanitized(name):
    """What coremltools' passes would make of a name."""
    from coremltools.converters.mil.mil.passes.defs.preprocess import NameSanitizer

    return NameSanitizer().sanitize_name(name, allow_prefix_underscore=False)


@pytest.mark.parametrize("name", ["odd", "v4", "v6", "v7a"])
def test_coremltools_computes_the_same(name, bundle):
    """A second opinion: its own inference of values, operation by operation, on the reloaded file."""
    path = bundle(name, target="coreml", profile="gpu", quant="int4")
    package = mil.Package(packages(path)[0])
    mil.messages()
    with mil.quiet():
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.converters.mil.mil import Builder, Function

        weights_dir = str((path / "model.mlpackage" / mil.WEIGHTS).parent)
        program = load(package.model, specification_version=9, file_weights_dir=weights_dir)
    function, ours = program.functions["decode"], mil.Interpreter(package, "decode", "native")
    rng = np.random.default_rng(0)
    given = {
        name: np.array([5], np.int32) if dtype == "int32" else rng.normal(size=shape).astype(np.float16)
        for name, (dtype, shape) in ours.inputs.items()
    }
    env, seen = dict(given), set()
    with mil.quiet(), Function({}, opset_version=program.functions["decode"].opset_version):
        for op in function.operations:
            if op.op_type == "const" or op.op_type.startswith("constexpr"):
                values = [op.outputs[0].val if op.op_type == "const" else op.materialized_val_inference()]
            else:
                arguments = {
                    k: tuple(env[x.name] for x in v) if isinstance(v, (list, tuple)) else env[v.name]
                    for k, v in op.inputs.items()
                    if v is not None
                }
                made = getattr(Builder, op.op_type)(**{k: plain(v) for k, v in arguments.items()})
                values = [x.val for x in (made if isinstance(made, (list, tuple)) else (made,))]
                assert all(v is not None for v in values), op.op_type
                seen.add(op.op_type)
            env |= {x.name: v for x, v in zip(op.outputs, values, strict=True)}
    assert seen == {o for o in ours.operations if not o.startswith("constexpr")}
    for name, x in ours(given).items():
        assert np.abs(x - env[name].astype(np.float32)).max() / x.std() < 0.02, name


def plain(x):
    """What the builder takes: no scalars of numpy."""
    return x.item() if isinstance(x, np.bool_) else x


# --- faults that somebody plants ---


def reseal(path):
    """Let a manifest agree with what is in the folder now: the fault must be seen by what it computes."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    (path / MANIFEST).write_bytes(dump_manifest(manifest))


def weights_fault(change):
    """Change the file of weights at a tensor's place."""

    def plant(path):
        manifest = json.loads((path / MANIFEST).read_bytes())
        file = path / "model.mlpackage" / mil.WEIGHTS
        data = bytearray(file.read_bytes())
        change(data, {name: entries[0] for name, entries in manifest["tensors"].items()})
        file.write_bytes(data)

    return plant


def message_fault(change):
    """Change the protobuf."""

    def plant(path):
        package = mil.Package(path / "model.mlpackage")
        change(package.model)
        (path / "model.mlpackage" / mil.MODEL).write_bytes(package.model.SerializeToString(deterministic=True))

    return plant


def graph_fault(change, role="decode"):
    """Change the protobuf's operations of one function."""
    return message_fault(
        lambda model: change(model.mlProgram.functions[role].block_specializations["CoreML8"].operations, model)
    )


def first(operations, type_, n=0):
    return [op for op in operations if op.type == type_][n]


def after(operations, type_):
    """The first operation that takes what the first one of this type gives."""
    name = first(operations, type_).outputs[0].name
    return next(op for op in operations if any(a.name == name for v in op.inputs.values() for a in v.arguments))


def constant(operations, name):
    return next(op for op in operations if op.outputs and op.outputs[0].name == name)


def swap_arguments(op, a, b):
    x, y = op.inputs[a].arguments[0].name, op.inputs[b].arguments[0].name
    op.inputs[a].arguments[0].name, op.inputs[b].arguments[0].name = y, x


def swap_offsets(operations, a, b):
    def place(op):
        return (op.attributes["val"] if op.type == "const" else op.inputs["indices"].arguments[0].value).blobFileValue

    a, b = (place(constant(operations, n)) for n in (a, b))
    a.offset, b.offset = b.offset, a.offset


def set_half(operations, op, param, factor):
    value = constant(operations, op.inputs[param].arguments[0].name).attributes["val"].immediateValue.tensor.bytes
    (x,) = struct.unpack("<e", value.values)
    value.values = struct.pack("<e", x * factor)


def set_constant(operations, op, param, change):
    change(constant(operations, op.inputs[param].arguments[0].name).attributes["val"].immediateValue.tensor)


def exchange(data, a, b, n):
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]


def rename_inputs(operations, a, b):
    for op in operations:
        for argument in (x for v in op.inputs.values() for x in v.arguments):
            if argument.name in (a, b):
                argument.name = b if argument.name == a else a


def wire_state_through(operations, model):
    """The state's output is made from the state's input: it is never written."""
    out = constant(operations, "state_0_att_x_out")
    out.inputs["x"].arguments[0].name = "state_0_att_x"


KEY, VALUE, DECAY = "blocks.0.att.key.weight", "blocks.1.ffn.value.weight", "blocks.0.att.w0"
# what the graph's file says changes; the manifest's table says where weights lie, and the reference reads them there: so a
# changed weight is only a fault if it is seen against the checkpoint
FAULTS = {
    "operands of a difference exchanged": graph_fault(lambda ops, m: swap_arguments(first(ops, "sub"), "x", "y")),
    "two matrices exchanged": graph_fault(
        lambda ops, m: swap_offsets(ops, "blocks_0_att_key_weight", "blocks_0_att_value_weight")
    ),
    "two vectors exchanged": graph_fault(lambda ops, m: swap_offsets(ops, "blocks_0_att_x_r", "blocks_0_att_x_k")),
    "what is made later": graph_fault(lambda ops, m: rename_inputs(ops, "blocks_0_att_x_r", "blocks_0_att_x_k")),
    "a number of a formula, by a thousandth": graph_fault(lambda ops, m: set_half(ops, after(ops, "sigmoid"), "x", 1.001)),
    "layers' states exchanged": graph_fault(lambda ops, m: rename_inputs(ops, "state_0_wkv", "state_1_wkv")),
    "a state is not written": graph_fault(wire_state_through),
    "eps of a norm, by a fifth": graph_fault(lambda ops, m: set_half(ops, first(ops, "layer_norm"), "epsilon", 1.2)),
    "largest instead of sum": graph_fault(lambda ops, m: setattr(first(ops, "reduce_sum"), "type", "reduce_max")),
    "sigmoid instead of tanh": graph_fault(lambda ops, m: setattr(first(ops, "tanh"), "type", "sigmoid")),
    "a product instead of a sum": graph_fault(lambda ops, m: setattr(first(ops, "add", 3), "type", "mul")),
    "relu left out": graph_fault(lambda ops, m: setattr(first(ops, "relu"), "type", "abs")),
    "tokens in another order": graph_fault(
        lambda ops, m: (
            swap_arguments(first(ops, "concat"), "values", "values")
            or first(ops, "concat").inputs["values"].arguments.reverse()
        ),
        "prefill",
    ),
    "two tokens' pieces exchanged": graph_fault(
        lambda ops, m: rename_inputs(ops, first(ops, "split").outputs[3].name, first(ops, "split").outputs[4].name), "prefill"
    ),
    "tables of another matrix": graph_fault(
        lambda ops, m: (
            constant(ops, "blocks_0_att_key_weight")
            .inputs["lut"]
            .CopyFrom(constant(ops, "blocks_0_att_value_weight").inputs["lut"])
        )
    ),
    "a record of another type": graph_fault(
        lambda ops, m: setattr(
            constant(ops, "blocks_0_att_key_weight").inputs["indices"].arguments[0].value.blobFileValue, "offset", 64
        )
    ),
    "tokens interleaved": graph_fault(
        lambda ops, m: set_constant(ops, first(ops, "concat"), "interleave", lambda t: t.bools.values.__setitem__(0, True)),
        "prefill",
    ),
    "a cast to integers": graph_fault(
        lambda ops, m: set_constant(ops, first(ops, "cast"), "dtype", lambda t: t.strings.values.__setitem__(0, "int32"))
    ),
    "an operation that nothing writes": graph_fault(lambda ops, m: setattr(first(ops, "square"), "type", "erf")),
    "a description of other inputs": graph_fault(
        lambda ops, m: m.description.functions[0].input[0].type.multiArrayType.shape.append(1)
    ),
}


@pytest.mark.parametrize("n_tokens", [2, 17, 32])
def test_prefill_is_proven_too_however_few_tokens_are_asked_for(n_tokens, bundle, tmp_path):
    """It takes 16 at a time, neither more nor fewer."""
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="fp16"), path)
    graph_fault(lambda ops, m: setattr(first(ops, "tanh"), "type", "sigmoid"), "prefill")(path)
    reseal(path)
    report = check(path, n_tokens=n_tokens)
    assert [row.ok for row in report.rows] == [True, False, True, False]
    assert report.n_tokens == 16 * -(-n_tokens // 16)
    assert [row.own.n for row in report.rows] == [report.n_tokens, report.n_tokens // 16] * 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, bundle, tmp_path):
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="lut4"), path)
    FAULTS[fault](path)
    reseal(path)
    try:
        report = check(path, n_tokens=32)
    except (BundleError, CheckFailed):
        return
    assert not report.ok
    assert {row.arithmetic for row in report.rows if not row.ok} >= {"exact"}


def manifest_fault(change):
    """Change the bundle's manifest."""

    def plant(path):
        manifest = json.loads((path / MANIFEST).read_bytes())
        change(manifest)
        (path / MANIFEST).write_bytes(dump_manifest(manifest))

    return plant


def redeclare(operations, model):
    for op in operations:
        if op.type in ("add", "mul", "sub") and not op.outputs[0].name.endswith("_out"):
            op.outputs[0].type.tensorType.dataType = 23


# what is seen because the packages are not what is written for these weights, or before anything is computed
OTHER_FAULTS = {
    "a removal key's divisor": graph_fault(lambda ops, m: setattr(first(ops, "reduce_max"), "type", "reduce_sum")),
    "an older specification": message_fault(lambda m: setattr(m, "specificationVersion", 1)),
    "another function first": message_fault(lambda m: setattr(m.description, "defaultFunctionName", "nosuch")),
    "features of another type": message_fault(
        lambda m: setattr(m.description.functions[0].input[1].type.multiArrayType, "dataType", 65600)
    ),
    "results of another type": graph_fault(redeclare),
    "a package of another model": lambda path: (path / "model.mlpackage" / "Manifest.json").write_text(
        '{"rootModelIdentifier":""}'
    ),
    "inputs of another type": manifest_fault(lambda m: m["graphs"][0]["inputs"][0].update(dtype="float16")),
    "an output more": manifest_fault(lambda m: m["graphs"][0]["outputs"].append(m["graphs"][0]["inputs"][0])),
    "decode is prefill": manifest_fault(lambda m: m["graphs"][0].update(T=16)),
    "prefill is decode": manifest_fault(lambda m: m["graphs"][1].update(function="decode", T=1)),
    "prefill of more": manifest_fault(lambda m: m["graphs"][1].update(T=1000000)),
    "a tensor less": manifest_fault(lambda m: m["tensors"].pop("blocks.1.att.w1")),
    "another version": manifest_fault(lambda m: m["spec"].update(version="6")),
    "another first value": manifest_fault(lambda m: [t.update(first=5.0) for t in m["state"]]),
    "no state": manifest_fault(lambda m: m.update(state=[])),
    "another scale": manifest_fault(lambda m: [g["scales"].update(heads=0.5) for g in m["graphs"]]),
}


@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_what_the_numbers_do_not_show_is_seen(fault, bundle, tmp_path):
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="lut4"), path)
    OTHER_FAULTS[fault](path)
    reseal(path)
    result = CliRunner().invoke(cli, ["check", str(path), "-n", "16"])
    assert result.exit_code in (1, 3), result.output
    assert result.exit_code == 3 or result.stdout == ""
    assert not isinstance(result.exception, (KeyError, ValueError)), result.exception
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("Error: ")


def test_packages_of_another_release_are_judged_by_their_numbers(bundle, tmp_path):
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="lut4"), path)
    manifest_fault(lambda m: m["made_by"].update(version="0.0.1"))(path)
    report = check(path, n_tokens=16)
    assert (report.ok, report.packages) == (True, None)
    assert check(bundle("odd", target="coreml", quant="lut4"), n_tokens=16).packages == ()


@pytest.mark.parametrize("options", [{"coreml_state": "packed", "part_bytes": 1}, {"coreml_state": "packed"}, {}])
def test_an_interrupt_leaves_the_state_as_it_was(options, bundle, monkeypatch):
    """Packed states of the first parts have read a token when the last part is interrupted."""
    model = open_bundle(bundle("odd", target="coreml", quant="fp16", **options), interpret="native")
    loop, other = model.loop(), model.loop()
    loop.read(np.arange(20))
    before, last = loop.tensors(), loop._parts["decode"][-1][1]._f
    n, when, run = 0, 0, last._run

    def interrupted(*args):
        nonlocal n
        n += 1
        if n == when:
            raise KeyboardInterrupt
        run(*args)

    monkeypatch.setattr(last, "_run", interrupted)
    other.read(np.arange(3))
    for when in (1, n // 2, n):  # noqa: B007
        n = 0
        with pytest.raises(KeyboardInterrupt):
            loop.read(np.arange(3))
        assert loop.n_tokens == 20
        for name, x in loop.tensors().items():
            np.testing.assert_array_equal(x, before[name])


def test_states_beyond_float16_are_refused(bundle, model):
    ours = open_bundle(bundle("v4", target="coreml", quant="fp16"), interpret="native")
    _, state = model("v4", quant="fp16").feed([1, 2, 3])
    ours.feed([4], state)
    state = State(state.model_id, 3, state.tensors | {"1.aa": np.full_like(state.tensors["1.aa"], 1e9)}, state.logits)
    with pytest.raises(StateError, match=r"1.aa of the state holds 1e\+09, which float16 does not"):
        ours.feed([4], state)


WEIGHT_FAULTS = {
    "one code": lambda data, t: data.__setitem__(t[KEY]["offset"], data[t[KEY]["offset"]] ^ 1),
    "one bit of a decay": lambda data, t: data.__setitem__(t[DECAY]["offset"] + 1, data[t[DECAY]["offset"] + 1] ^ 8),
    "tables exchanged": lambda data, t: exchange(data, t[VALUE]["scales"]["offset"], t[VALUE]["scales"]["offset"] + 32, 32),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_a_fault_in_the_weights_is_seen(fault, bundle, tmp_path):
    """By the file's sha256; and if that is made to agree, by what the weights are: another bundle of the same model."""
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="lut4"), path)
    before = read_bundle(path)
    whole = {name: np.asarray(t.read().dequantize() if t.bits < 16 else t.read()) for name, t in before.tensors.items()}
    weights_fault(WEIGHT_FAULTS[fault])(path)
    with pytest.raises(BundleError, match="sha256"):
        check(path)
    reseal(path)
    after = read_bundle(path)
    changed = [
        name
        for name, t in after.tensors.items()
        if not np.array_equal(whole[name], t.read().dequantize() if t.bits < 16 else t.read())
    ]
    assert len(changed) == 1


# --- arithmetic in float16 ---


def plain_l2(self, x, *, eps):
    x = self.unpack(x)
    shape, axes = self._reduced(x), coreml._ints((self.within_head,))
    total = self.op("reduce_sum", shape, "column", x=self.unary("square", x), axes=axes, keep_dims=coreml._bool(True))
    return x / self.unary("sqrt", self.binary("maximum", total, coreml.HALF_NORMAL))


def plain_exp(self, x):
    return self.unary("exp", x, sign=1)


class Added:
    """Instead of a Change, its sum."""

    def __new__(cls, S, d):
        return S + d


def changed(**factors):
    """A change of weights: factors by the ends of names, with __ for a point; att.w0 is set."""

    def change(w):
        for name in w:
            for end, factor in factors.items():
                if name.endswith(end.replace("__", ".")):
                    w[name] = np.float32(factor) * (np.ones_like(w[name]) if end == "att__w0" else w[name])

    return change


def slow(w):
    for name in w:
        if name.endswith("time_decay"):
            w[name] = np.full_like(w[name], -5)
    changed(att__key__weight=4)(w)


# what a formula is for: a shape and weights that need it, what stands without it, and how much more it costs then, at least
FORMULAS = {
    "norms that are scaled": ("odd", changed(att__k_k=300), coreml.Mil, "l2_normalize", plain_l2, 10),
    # 600 tokens with w = .9998: float16 knows 1 and .9995
    "decays by their complements": ("odd", changed(att__w0=-8, att__w2=0.1), coreml.Mil, "exp", plain_exp, 4),
    "changes of a state, summed first": ("odd", changed(att__w0=-8, att__w2=0.1), coreml, "Change", Added, 4),
    "powers of two around the square of relu": (
        "odd",
        changed(ffn__key__weight=150, ffn__value__weight=1 / 20),
        coreml,
        "_KEY",
        1.0,
        10,
    ),
    "a small residual stream": (
        "odd",
        changed(att__output__weight=3e4, ffn__value__weight=3e3),
        coreml,
        "_RESIDUAL",
        {0: 1.0},
        10,
    ),
    "small values in RWKV-4": (
        "v4",
        changed(att__value__weight=7e3, att__output__weight=0.01),
        coreml,
        "_RESIDUAL",
        {0: 1.0},
        10,
    ),
    "small values in RWKV-6": ("v6", changed(att__value__weight=2e3), coreml, "_VALUES", 1.0, 10),
    "small receptances in RWKV-5": (
        "v5.2",
        changed(att__value__weight=300, att__receptance__weight=20),
        coreml,
        "_READ",
        1.0,
        10,
    ),
    # 600 tokens with e^w = .9933, keys of up to 26
    "decays of sums in RWKV-4": ("v4", slow, coreml, "wkv_form", lambda spec: "step", 100),
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_float16_needs_the_formula(formula, tmp_path, monkeypatch):
    shape, change, owner, name, plain, more = FORMULAS[formula]
    cost = kl_of(export_of(tmp_path, change, shape))
    assert cost < 1e-3
    monkeypatch.setattr(owner, name, plain)
    with np.errstate(all="ignore"):
        assert not kl_of(export_of(tmp_path / "without", change, shape)) < more * cost


@pytest.mark.parametrize("name", ["demo", *factory.SHAPES])
def test_a_unit_that_knows_no_subnormal_numbers(name, bundle):
    """All that is lost without them is what the first tokens of RWKV-5 hear of its norms' eps, where they hear little."""
    path = bundle(name, target="coreml", quant="int8")
    assert kl_of(path, "flushed") < 1e-4


def test_rows_of_an_embedding_are_normal_numbers(tmp_path, monkeypatch):
    """They begin at 1e-4 in training, and may stay small."""
    small = changed(emb__weight=1e-4)
    path = export_of(tmp_path, small)
    cost = kl_of(path)
    assert kl_of(path, "flushed") < 2 * cost < 1e-2
    monkeypatch.setattr(coreml, "_EMBEDDING", 1.0)
    assert not kl_of(export_of(tmp_path / "without", small), "flushed") < 100 * cost


def test_the_smallest_removal_keys_are_divided_too(tmp_path):
    """Their largest is below float16's normal numbers, and what it is divided by is not."""
    path = export_of(tmp_path, changed(att__k_k=3e-3, att__key__weight=3e-3))
    assert check(path, n_tokens=32).ok


def test_rwkv_4_begins_with_a_number(monkeypatch, tmp_path):
    """In float16 -1e30 is an infinity, which not every unit computes with; beside zero a small first key vanishes: 0 / 0."""
    w = factory.weights(**factory.BEFORE_7["v4"])
    pth = factory.write_pth(tmp_path / "m.pth", w | {n: x - 25 for n, x in w.items() if n.endswith("time_first")}, "fp32")
    for first, finite, holds in ((-10000.0, True, True), (-1e30, False, True), (0.0, True, False)):
        if first != -10000.0:
            monkeypatch.setattr(coreml, "first_value", lambda t, first=first: first if t.first else 0.0)
        folder = tmp_path / str(first)
        export(pth, folder, target="coreml", quant="fp16")
        said = {t["name"]: t["first"] for t in read_bundle(folder).manifest["state"]}
        assert {x for name, x in said.items() if name.endswith("pp")} == {first}
        with np.errstate(all="ignore"):
            assert np.isfinite(np.float16(list(said.values()))).all() == finite
            assert (kl_of(folder) < 1e-3) == holds


def export_of(folder, change, shape="odd"):
    """A bundle of a shape with weights that are changed first."""
    folder.mkdir(exist_ok=True)
    w = {name: x.copy() for name, x in factory.weights(**factory.SHAPES[shape]).items()}
    change(w)
    pth = factory.write_pth(folder / "m.pth", w, "fp32")
    export(pth, folder / "b", target="coreml", quant="fp16")
    return folder / "b"


def kl_of(path, arithmetic="native"):
    """What float16 costs: nats a token, against the step in float64 on the same weights, from the version's own start."""
    b = read_bundle(path)
    ids = factory.tokens(600, b.spec.n_vocab)
    start = {name: np.full(t.shape, -1e30 if name.endswith("pp") else 0.0) for name, t in b.spec.state_tensors.items()}
    expected, _ = run_reference(b.spec, Weights(b.tensors), ids, start, dtype=np.float64)
    loop = open_bundle(path, interpret=arithmetic).loop()
    got = loop.read(np.array(ids), every=True).astype(np.float64)
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (expected, got))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


# --- calibration ---


def test_tables_are_made_for_what_flows_into_them(tmp_path, bundle):
    """Calibrated, they are what kmeans gives with the model's own mean squares, and cost less where these were measured."""
    path = tmp_path / "b"
    text = documents(DEMO.with_name("stories.txt"))
    told = []
    options = {"target": "coreml", "quant": "lut4"}
    export(DEMO, path, calibrate=text, progress=lambda *n: told.append(n), **options)
    assert [done / total for done, total in told] == sorted(done / total for done, total in told)
    assert told[-1][0] == told[-1][1]
    b, source = read_bundle(path), open_checkpoint(DEMO)
    ids = [i for t in text for i in [0, *open_tokenizer(DEMO.with_name("tokenizer.json")).encode(t)]]
    importance = mean_squares(source.spec, Weights(source.tensors), ids)
    name = "blocks.2.att.output.weight"
    expected = kmeans(source.tensors[name].read(), bits=4, rows=16, importance=importance[name])
    np.testing.assert_array_equal(b.tensors[name].read().dequantize(), expected.dequantize())
    assert b.tensors[name].method == "weighted kmeans"
    assert b.tensors["emb.weight"].method == "rtn"
    costs = [float((importance[name] * np.square(p.tensors[name].read().dequantize() - source.tensors[name].read())).sum())
             for p in (b, read_bundle(bundle("demo", **options)))]  # fmt: skip
    assert costs[0] < costs[1]
    assert b.model_id == read_bundle(bundle("demo", **options)).model_id


def test_a_text_to_calibrate_on_is_one_text(weights):
    plan = coreml_plan(weights("odd")[0], "lut4", "ane")
    texts = find_texts(open_checkpoint(DEMO))
    assert _calibration(plan, "Once upon a time", texts) == _calibration(plan, ["Once upon a time"], texts)


def test_calibrations_that_cannot_be_are_refused(tmp_path, random_pth):
    text, output = str(DEMO.with_name("stories.txt")), str(tmp_path / "x")
    result = CliRunner().invoke(cli, ["export", str(DEMO), "--quant", "int4", "--calibrate", text, "-o", output])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "calibrate is for tables: give quant lut4 or lut6" in result.stderr
    with pytest.raises(InputError, match="takes a tokenizer, and none lies beside the checkpoint"):
        export(random_pth("odd"), tmp_path / "x", target="coreml", quant="lut4", calibrate=["a"])
    with pytest.raises(InputError, match="the text to calibrate on is empty"):
        export(DEMO, tmp_path / "x", target="coreml", quant="lut4", calibrate=[])
    assert not list(tmp_path.iterdir())


# --- the runtime ---


def test_the_same_text_as_by_onnxruntime(bundle, model):
    ours = open_bundle(bundle("demo", target="coreml", quant="fp16"), interpret="native")
    theirs = model("demo", quant="fp16")
    prompt = theirs.encode("Once upon a time, in a small village by the sea, there lived")
    a, b = ([t.id for t in m.generate(prompt, max_tokens=100, temperature=0)] for m in (ours, theirs))
    assert a == b


@pytest.mark.parametrize("name", ["demo", "v4", "v6"])
@pytest.mark.parametrize("state", ["explicit", "packed"])
def test_states_go_from_one_bundle_to_the_other(name, state, bundle, model):
    ours = open_bundle(bundle(name, target="coreml", quant="fp16", coreml_state=state), interpret="native")
    theirs = model(name, quant="fp16")
    ids = factory.tokens(40, ours.spec.n_vocab)
    for a, b in ((ours, theirs), (theirs, ours)):
        _, state = a.feed(ids[:21])
        logits, _ = b.feed(ids[21:], state)
        expected, _ = theirs.feed(ids)
        assert np.abs(logits - expected).max() / expected.std() < 0.05


@pytest.mark.parametrize("options", [{}, {"coreml_state": "packed"}, {"part_bytes": 1}, {"profile": "gpu"}])
@pytest.mark.parametrize("name", ["odd", "v4", "v7a"])
def test_calls_together_are_calls_one_after_the_other(name, options, bundle, monkeypatch):
    """And where little is kept, a matrix is made from its tables once for all calls, unless Core ML keeps the state."""
    path = bundle(name, target="coreml", quant="lut4", **options)
    made, dense = 0, mil._CONSTEXPR["constexpr_lut_to_dense"]

    def counted(**arguments):
        nonlocal made
        made += 1
        return dense(**arguments)

    monkeypatch.setitem(mil._CONSTEXPR, "constexpr_lut_to_dense", counted)
    parts = len(packages(path))
    monkeypatch.setattr(mil, "KEPT", 200_000 * parts)
    found = []
    for at_once in (1, 64):
        monkeypatch.setattr(Interpreted, "at_once", at_once)
        model, made = open_bundle(path, interpret="exact"), 0
        loop = model.loop()
        ids = np.array(factory.tokens(9, model.spec.n_vocab))
        found.append((loop.run("decode", ids), *loop.tensors().values()))
        tables = sum(t.rows_per_table is not None for t in read_bundle(path).tensors.values())
        once = at_once == 64 and options != {"coreml_state": "packed"}
        assert (made == tables) if once else (made > 2 * tables)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [16, 24], [7, 33], [17, 16, 7]])
@pytest.mark.parametrize("state", ["explicit", "packed"])
def test_a_prompt_may_come_in_any_pieces(cuts, state, bundle):
    m = open_bundle(bundle("odd", target="coreml", quant="fp16", coreml_state=state), interpret="exact")
    ids = np.array(factory.tokens(40, m.spec.n_vocab))
    whole = m.loop()
    expected = whole.read(ids)[0]
    loop, at = m.loop(), 0
    for n in cuts:
        logits = loop.read(ids[at : at + n])[-1]
        at += n
    assert np.abs(logits - expected).max() <= COREML_EXACT
    assert loop.n_tokens == 40


class StandIn:
    """In the place of coremltools' MLModel, which predicts on macOS alone: its signatures, and our interpreter behind them."""

    units: ClassVar[list[str]] = []

    def __init__(self, *args, **options):
        import coremltools

        said = inspect.signature(coremltools.models.model.MLModel.__init__).bind(self, *args, **options).arguments
        self.f = mil.Interpreter(mil.Package(Path(said["model"])), said["function_name"])
        self.units.append(said["compute_units"].name)

    def predict(self, data, state=None):
        assert {x.dtype for x in data.values()} <= {np.dtype(np.int32), np.dtype(np.float16)}
        assert all(x.shape == self.f.inputs[name][1] for name, x in data.items())
        return {name: x.astype(np.float16) for name, x in self.f(data, state and state.array).items()}

    def make_state(self):
        return StandInState(self.f)


class StandInState:
    def __init__(self, f):
        self.name, self.array = f.state_name, np.full(f.state[1], np.nan, np.float32)

    def write_state(self, name, value):
        assert (name, value.dtype, value.shape) == (self.name, np.float32, self.array.shape)
        self.array[...] = value

    def read_state(self, name):
        assert name == self.name
        return self.array


@pytest.mark.parametrize("options", [{}, {"coreml_state": "packed"}, {"coreml_state": "packed", "part_bytes": 1}])
@pytest.mark.parametrize("name", ["odd", "v4"])
def test_what_would_be_asked_of_core_ml(name, options, bundle, monkeypatch):
    """On a Mac parts are loaded and called as coremltools' signatures want it; what it computes, only a Mac shows."""
    mil.messages()
    with mil.quiet():
        import coremltools
    path = bundle(name, target="coreml", profile="gpu", quant="fp16", **options)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", StandIn)
    monkeypatch.setattr(StandIn, "units", [])
    monkeypatch.setattr(Interpreted, "at_once", 1)  # sums of several calls at once are in another order
    ours, theirs = open_bundle(path), open_bundle(path, interpret="native")
    assert set(StandIn.units) == {"CPU_AND_GPU"}
    ids = factory.tokens(21, ours.spec.n_vocab)
    for a, b in ((ours, theirs), (theirs, ours)):
        logits, state = a.feed(ids)
        np.testing.assert_array_equal(logits, theirs.feed(ids)[0])
        made = [[t.id for t in m.generate([], state, max_tokens=5, temperature=0)] for m in (a, b)]
        assert made[0] == made[1]


@pytest.mark.skipif(sys.platform == "darwin", reason="there it runs")
def test_without_core_ml_the_interpreter_is_offered(bundle):
    path = bundle("odd", target="coreml", quant="fp16")
    with pytest.raises(BackendError, match=r"runs on macOS 15: elsewhere run, chat and eval compute it .*--interpret"):
        open_bundle(path)
    result = CliRunner().invoke(cli, ["run", str(path), "--ids", "1 2 3", "-n", "4", "--interpret", "-t", "0", "-q"])
    assert result.exit_code == 0
    assert len(result.stdout.split()) == 4
    with pytest.raises(InputError, match="nothing is interpreted"):
        open_bundle(bundle("odd", quant="fp16"), interpret="native")
    with pytest.raises(BackendError, match="expected exact, native or flushed"):
        open_bundle(path, interpret="fast")


def test_a_text_is_measured_beside_other_bundles(bundle, tmp_path):
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a little girl who lived in a house by the sea.")
    paths = [str(bundle("demo", quant="fp16")), str(bundle("demo", target="coreml", quant="fp16"))]
    result = CliRunner().invoke(cli, ["eval", *paths, "--interpret", "--text", str(text), "--json"])
    assert result.exit_code == 0, result.output
    ours, theirs = json.loads(result.stdout)["scores"]
    assert theirs["kl"]["value"] < 1e-4
    assert abs(theirs["perplexity"]["value"] / ours["perplexity"]["value"] - 1) < 1e-2
    result = CliRunner().invoke(cli, ["bench", paths[1]])
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"Error: {paths[1]} is a Core ML bundle, and bench measures onnxruntime: on a Mac, use apple/on_a_mac.py\n"
    )


def test_the_interpreter_takes_numpy_and_coremltools_messages_alone(bundle):
    package = bundle("odd", target="coreml", quant="lut4") / "model.mlpackage"
    code = (
        "import sys\n"
        "for name in ('onnxruntime', 'onnx', 'click', 'tokenizers', 'safetensors', 'torch'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from rwkv_edge.mil import Interpreter, Package\n"
        f"f = Interpreter(Package(Path({str(package)!r})), 'decode')\n"
        "out = f({n: np.zeros(shape, dtype if dtype == 'int32' else 'f4') for n, (dtype, shape) in f.inputs.items()})\n"
        "print(out['logits'].shape, 'coremltools' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (out.stdout, out.stderr) == ("(1, 61) False\n", "")


# --- files ---


def test_same_bytes_in_any_process(tmp_path, bundle):
    here = bundle("demo", target="coreml", quant="lut4")
    code = f"from rwkv_edge import export; export({str(DEMO)!r}, {str(tmp_path / 'again')!r}, target='coreml', quant='lut4')"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "123"})
    files = sorted(p.relative_to(here) for p in here.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for name in files:
        assert (here / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_manifest_follows_the_schema(bundle):
    for options in ({"quant": "lut4"}, {"quant": "int4", "profile": "gpu", "coreml_state": "packed"}):
        manifest = read_bundle(bundle("v7a", target="coreml", **options)).manifest
        jsonschema.validate(manifest, SCHEMA)


def test_a_folder_of_packages_is_replaced_only_if_it_is_ours(tmp_path, random_pth):
    make = functools.partial(export, random_pth("odd"), tmp_path / "b", target="coreml", quant="fp16")
    make()
    make(force=True)
    (tmp_path / "b" / "model.mlpackage" / "mine.txt").write_text("mine")
    with pytest.raises(Exception, match=r"holds 'model.mlpackage/mine.txt'"):
        make(force=True)


@given(st.sampled_from([4, 6]), st.integers(1, 9), st.integers(1, 5), st.randoms(use_true_random=False))
def test_packed_codes_come_back(bits, n_out, groups, random):
    n_in = groups * (2 if bits == 4 else 4)
    codes = np.array([[random.randrange(1 << bits) for _ in range(n_in)] for _ in range(n_out)], np.uint8)
    data = np.frombuffer(pack_bits(codes, bits), np.uint8)
    assert len(data) == codes.size * bits // 8
    np.testing.assert_array_equal(
        unpack_bits(data.reshape(n_out, -1) if n_in * bits % 8 == 0 else data, bits).reshape(codes.shape), codes
    )


def test_codes_are_packed_as_coremltools_packs_them(tmp_path):
    mil.messages()
    with mil.quiet():
        from coremltools.converters.mil.mil import types
        from coremltools.libmilstoragepython import _BlobStorageWriter
    rng = np.random.default_rng(0)
    for bits in (4, 6):
        codes = rng.integers(0, 1 << bits, (8, 16)).astype(np.uint8)
        writer = _BlobStorageWriter(str(tmp_path / f"{bits}.bin"))
        dtype = types.np_uint4_dtype if bits == 4 else types.np_uint6_dtype
        at = getattr(writer, f"write_uint{bits}_data")(codes.reshape(-1).astype(dtype))
        del writer
        data = (tmp_path / f"{bits}.bin").read_bytes()
        header = mil.HEADER.unpack(data[at : at + 64])
        ours = pack_bits(codes, bits)
        assert header[:5] == (mil.SENTINEL, mil.BLOB_DTYPES[f"uint{bits}"], len(ours), at + 64, 0)
        assert data[at + 64 : at + 64 + len(ours)] == ours


def test_half_scales_keep_the_error_small():
    w = factory.uniform("w", (8, 64))
    q = with_half_scales(w, rtn(w, bits=4, block=32))
    assert np.array_equal(q.scales, q.scales.astype(np.float16))
    assert np.square(q.dequantize() - w).sum() <= 1.02 * np.square(rtn(w, bits=4, block=32).dequantize() - w).sum()
    assert isinstance(with_half_scales(w, rtn(w, bits=8, block=64)), QTensor)
    small = w * np.float32(2e-3)  # at 8 bits their scales would be 1.5e-5, which a unit may take as 0
    q = with_half_scales(small, rtn(small, bits=8, block=64))
    assert (np.abs(q.scales) == 2.0**-14).all()
    assert np.abs(q.dequantize() - small).max() <= 2.0**-15
    for scale in (1e9, 1e-9):
        with pytest.raises(QuantizeError, match="do not fit float16"):
            with_half_scales(w * np.float32(scale), rtn(w * np.float32(scale), bits=8, block=64))


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"profile": "ane", "quant": "int4"}, QuantizeError, "Engine is reported to .* wrongly, .*: use lut4, or profile gpu"),
        ({"quant": "none"}, QuantizeError, "Core ML computes in float16: use fp16"),
        ({"quant": "lut5"}, QuantizeError, "'lut5' is unknown: profile ane takes fp16, int8, lut4, lut6"),
        ({"quant": "fp16", "block": 32}, QuantizeError, "block 32 says nothing with quant fp16"),
        ({"quant": "lut4", "block": 12}, QuantizeError, "block 12 is not possible"),
        ({"quant": "lut4", "overrides": ("head.weight=32",)}, QuantizeError, "with 4, 6, 8 or 16 bits"),
        ({"quant": "lut4", "overrides": ("nobody=8",)}, QuantizeError, "matches no matrix"),
        ({"quant": "lut4", "overrides": ("emb.weight=4",)}, QuantizeError, "takes 8 or 16 bits: it is read row by row"),
        ({"quant": "lut4", "overrides": ("*.w2=4",)}, QuantizeError, "inputs, which lut4 cannot pack: give --override"),
        ({"profile": "tpu"}, ExportError, "profile 'tpu' is unknown: expected one of ane, gpu"),
        ({"coreml_state": "none"}, ExportError, "coreml_state 'none' is unknown"),
        ({"wkv": "plain"}, ExportError, "is of target onnx"),
        ({"part_bytes": 0}, ExportError, "part_bytes 0 is not possible"),
        ({"target": "tflite"}, ExportError, "target 'tflite' is unknown: expected one of onnx, coreml"),
        ({"target": "onnx", "profile": "ane"}, ExportError, "profile ane is for Core ML: give target coreml with it"),
        ({"target": "onnx", "quant": "lut6"}, QuantizeError, "quant lut6 is for Core ML: give target coreml with it"),
    ],
)
def test_what_cannot_be_is_refused(options, error, words, tmp_path, random_pth):
    with pytest.raises(error, match=words):
        export(random_pth("odd"), tmp_path / "x", **{"target": "coreml"} | options)
    assert not list(tmp_path.iterdir())


def test_the_plan_by_kind(weights):
    spec, _ = weights("plain")
    plan = coreml_plan(spec, "lut4", "ane")
    assert plan["blocks.0.att.key.weight"] == Recipe(4, None, "kmeans", rows=16)
    assert plan["emb.weight"] == Recipe(8, spec.n_embd, "rtn", half=True)
    assert plan["blocks.0.att.w1"] == Recipe(8, spec.n_embd, "rtn", half=True)
    assert plan["blocks.0.att.w0"] == Recipe(16)
    assert coreml_plan(spec, "int4", "gpu")["head.weight"] == Recipe(4, 32, "rtn", half=True)
    assert coreml_plan(spec, "lut4", "ane", overrides=("head.*=16",))["head.weight"] == Recipe(16)
    lut = Lut(np.zeros((4, 8), np.uint8), np.zeros((2, 16), np.float32), 4, 2)
    assert lut.nbytes == Recipe(4, None, "kmeans", rows=2).nbytes((4, 8))


def test_threads_are_onnxruntime_s(bundle):
    path = bundle("odd", target="coreml", quant="fp16")
    with pytest.raises(InputError, match="takes no number of threads: that is onnxruntime's"):
        open_bundle(path, threads=1, interpret="native")
    with pytest.raises(InputError, match="takes no number of threads"):
        check(path, threads=1)


def test_an_initial_state_beyond_float16_is_refused(tmp_path, random_pth):
    source = random_pth("odd")
    spec = open_checkpoint(source).spec
    shape = (spec.n_head, spec.head_size, spec.head_size)
    given = {f"blocks.{i}.att.time_state": np.full(shape, 7e4, np.float32) for i in range(spec.n_layer)}
    save_file(given, tmp_path / "tuned.safetensors")
    with pytest.raises(ExportError, match=r"0\.wkv is beyond float16, in which Core ML keeps states"):
        export(source, tmp_path / "x", target="coreml", quant="fp16", initial_state=tmp_path / "tuned.safetensors")
    export(source, tmp_path / "x", quant="fp16", initial_state=tmp_path / "tuned.safetensors")


def test_a_damaged_manifest_is_told_as_what_it_is(bundle, tmp_path):
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="fp16"), path)
    manifest_fault(lambda m: m["graphs"][0].update(T="x"))(path)
    with pytest.raises(BundleError, match=r"manifest.graphs\[0\].T is 'x'"):
        read_bundle(path)


def test_every_file_of_a_package_has_its_sha256(bundle, tmp_path):
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="fp16"), path)
    for file in ("Manifest.json", mil.MODEL, mil.WEIGHTS):
        before = (path / MANIFEST).read_bytes()
        manifest_fault(lambda m, file=file: m["files"].pop(f"model.mlpackage/{file}"))(path)
        with pytest.raises(BundleError, match=f"uses 'model.mlpackage/{file}' but does not list it"):
            read_bundle(path)
        (path / MANIFEST).write_bytes(before)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_damaged_package_is_refused_in_one_line(keep, bundle, tmp_path):
    path = tmp_path / "b"
    shutil.copytree(bundle("odd", target="coreml", quant="fp16"), path)
    model = path / "model.mlpackage" / mil.MODEL
    model.write_bytes(model.read_bytes()[:keep])
    with pytest.raises(BundleError, match="bytes, expected"):
        check(path)
    reseal(path)
    with pytest.raises(BundleError) as e:
        check(path)
    assert "\n" not in str(e.value)


def test_without_coremltools_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['coremltools'] = None\n"
        "from rwkv_edge import export, RwkvEdgeError\n"
        f"try: export({str(DEMO)!r}, {str(tmp_path / 'x')!r}, target='coreml')\n"
        "except RwkvEdgeError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "pip install 'rwkv-edge[coreml]'" in out
    assert not list(tmp_path.iterdir())
