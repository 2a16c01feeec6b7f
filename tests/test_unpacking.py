"""The proof's reader of weights against those that decide: onnxruntime's operators, and coremltools' own reading."""

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from rwkv_edge import mil
from rwkv_edge.bundle import read_bundle
from rwkv_edge.qtensor import BLOCKS
from rwkv_edge.unpacking import Piece, Weights, codes_of, signed

DTYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
RNG = np.random.default_rng(0)


def one_node(op, inputs, initializers, order, **attributes):
    """What onnxruntime computes."""
    node = onnx.helper.make_node(op, list(order), ["y"], domain="com.microsoft", **attributes)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in inputs.items()
        ],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(x, n) for n, x in initializers.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (y,) = ort.InferenceSession(model.SerializeToString()).run(None, inputs)
    return y


def as_matmulnbits_has_them(data, scales, n_in, bits, block):
    x = {"x": np.eye(n_in, dtype=np.float32)}
    y = one_node("MatMulNBits", x, {"b": data, "s": scales}, "xbs", K=n_in, N=len(data), bits=bits, block_size=block)
    return y.T


def write(folder, shape, bits, block):
    """Any bytes and scales, the scales first: the entry that a manifest would have, and what was written."""
    n_blocks = -(-shape[1] // block)
    data = RNG.integers(0, 256, (shape[0], n_blocks, block * bits // 8), dtype=np.uint8)
    scales = RNG.standard_normal((shape[0], n_blocks)).astype(np.float32)
    (folder / "w").write_bytes(b"\0" * 12 + scales.tobytes() + b"\0" * 5 + data.tobytes())
    entry = {"file": "w", "offset": 17 + scales.nbytes, "shape": list(shape), "dtype": "U8", "bits": bits, "block": block}
    return entry | {"scales": {"offset": 12, "bytes": scales.nbytes}}, data, scales


@pytest.mark.parametrize(
    ("bits", "block", "n_in"), [*itertools.product([4, 8], BLOCKS, [256]), (4, 32, 40), (8, 16, 3), (4, 64, 100)]
)
def test_any_bytes_are_what_matmulnbits_has(bits, block, n_in, tmp_path):
    entry, data, scales = write(tmp_path, (5, n_in), bits, block)
    expected = as_matmulnbits_has_them(data, scales, n_in, bits, block)
    np.testing.assert_array_equal(Weights(tmp_path, {"w": entry})["w"], expected)
    np.testing.assert_array_equal(Piece(tmp_path, entry, 0).read(2, 4).weights(), expected[2:4])


@pytest.mark.parametrize("block", BLOCKS)
def test_any_bytes_are_what_gatherblockquantized_has(block, tmp_path):
    entry, data, scales = write(tmp_path, (5, 256), 8, block)
    x = {"i": np.array([4, 0, 1, 3, 2], np.int64)}
    held, options = {"b": data.reshape(5, -1), "s": scales}, {"gather_axis": 0, "quantize_axis": 1}
    y = one_node("GatherBlockQuantized", x, held, "bis", bits=8, block_size=block, **options)
    np.testing.assert_array_equal(Weights(tmp_path, {"w": entry})["w"][x["i"]], y)


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_a_bundle_s_matrices_are_what_matmulnbits_has(quant, bundle):
    path = bundle("odd", quant=quant)
    b = read_bundle(path)
    found = Weights(path, b.manifest["tensors"])
    assert set(found) == set(b.spec.weights)
    for name, t in b.manifest["tensors"].items():
        if t["block"]:
            raw = np.fromfile(path / t["file"], np.uint8)
            n_blocks = -(-t["shape"][1] // t["block"])
            data = raw[t["offset"] :][: t["bytes"]].reshape(t["shape"][0], n_blocks, -1)
            scales = raw[t["scales"]["offset"] :][: t["scales"]["bytes"]].view("<f4").reshape(-1, n_blocks)
            expected = as_matmulnbits_has_them(data, scales, t["shape"][1], t["bits"], t["block"])
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"quant": "lut4"},
        {"quant": "lut6"},
        {"quant": "int8"},
        {"quant": "int4", "profile": "gpu"},
        {"quant": "lut4", "part_bytes": 1},
    ],
)
def test_a_package_s_weights_are_what_coremltools_has(options, bundle):
    """Its own reader of the file, and its own inference of what a constexpr makes."""
    path = bundle("odd", target="coreml", **options)
    b = read_bundle(path)
    mil.messages()
    with mil.quiet():
        from coremltools.converters.mil.frontend.milproto.load import load
    held = {}
    for package in sorted({g["file"] for g in b.manifest["graphs"]}):
        weights_dir = str((path / package / mil.WEIGHTS).parent)
        with mil.quiet():
            program = load(mil.Package(path / package).model, specification_version=9, file_weights_dir=weights_dir)
            for op in program.functions["decode"].operations:
                if op.op_type.startswith("const"):
                    constant = op.op_type == "const"
                    held[op.outputs[0].name] = op.outputs[0].val if constant else op.materialized_val_inference()
    held["emb_weight"] = held["emb_weight_data"] * held["emb_weight_scales"]  # gathered before they are multiplied
    found, seen = Weights(path, b.manifest["tensors"]), 0
    for name, ts in b.manifest["tensors"].items():
        if ts[0]["scales"]:
            factor = np.float32(ts[0]["factor"])
            x = held[name.replace(".", "_")].astype(np.float16) * factor
            rounded = (found[name] / factor).astype(np.float16) * factor  # theirs is the product in float16
            np.testing.assert_array_equal(rounded.reshape(x.shape), x, err_msg=name)
            seen += 1
    assert seen >= 20


@pytest.mark.parametrize("bits", [4, 6])
def test_codes_that_coremltools_writes_are_read(bits, tmp_path):
    mil.messages()
    with mil.quiet():
        from coremltools.converters.mil.mil import types
        from coremltools.libmilstoragepython import _BlobStorageWriter
    codes = RNG.permutation(np.arange(8 * 64) % 2**bits).astype(np.uint8)
    writer = _BlobStorageWriter(str(tmp_path / "w"))
    at = getattr(writer, f"write_uint{bits}_data")(codes.astype(types.np_uint4_dtype if bits == 4 else types.np_uint6_dtype))
    del writer
    data = np.fromfile(tmp_path / "w", np.uint8, len(codes) * bits // 8, offset=at + 64)  # behind its header
    np.testing.assert_array_equal(codes_of(data, bits), codes)


def test_bytes_by_hand():
    a, b, c = 0b10_000001, 0b0011_0111, 0b111110_01
    assert codes_of(np.array([a, b, c], np.uint8), 6).tolist() == [0b000001, 0b011110, 0b010011, 0b111110]
    assert codes_of(np.array([0xF1, 0x28], np.uint8), 4).tolist() == [1, 15, 8, 2]
    assert signed(np.array([1, 15, 8, 7], np.uint8), 4).tolist() == [1, -1, -8, 7]
    assert signed(np.array([1, 255, 128, 127], np.uint8), 8).tolist() == [1, -1, -128, 127]
