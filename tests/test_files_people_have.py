"""Files as trainers, converters and download sites leave them: read right, or named in one line that says what to do.

Expected numbers are computed here: the documented formula of each adapter in float64, and a whole step of RWKV-5.
"""

import gzip
import io
import json
import math
import struct
import tarfile
import zipfile

import factory
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import GRAPH, apart
from factory import _int, _text, gguf_entry, gguf_tensor, gguf_value, write_pth, write_safetensors

from rwkv_edge import export, open_bundle
from rwkv_edge.checkpoints import model_id, open_checkpoint
from rwkv_edge.checkpoints.initial_state import read_initial_state
from rwkv_edge.checkpoints.lora import with_lora
from rwkv_edge.cli import cli
from rwkv_edge.convert import quantize
from rwkv_edge.errors import CheckpointError, RwkvEdgeError

ODD = factory.weights(**factory.SHAPES["odd"])
KEY = "blocks.1.att.key.weight"
FFN = "blocks.0.ffn.key.weight"


def reading(path, lora=None):
    return {n: t.read() for n, t in with_lora(open_checkpoint(path), lora).tensors.items()}


def refused(path, lora=None):
    with pytest.raises(RwkvEdgeError) as e:
        reading(path, lora)
    assert str(e.value).isprintable()
    return str(e.value)


def same(path, w=ODD):
    """A file holds these weights: what the plain .pth of them gives."""
    plain = reading(write_pth(path.parent / "plain.pth", w, "fp32"))
    found = reading(path)
    assert list(found) == list(plain)
    for n, x in plain.items():
        np.testing.assert_array_equal(found[n], x, err_msg=n)


@pytest.fixture
def odd(tmp_path):
    (tmp_path / "base").mkdir()
    return write_pth(tmp_path / "base" / "model.pth", ODD, "fp32")


# --- types that are no floating-point numbers ---

TYPES = {"U8": 1, "I8": 1, "I16": 2, "I32": 4, "U32": 4, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F64": 8, "F32": 4}


def typed(path, tensors, metadata=None):
    """A safetensors file of (dtype, shape) or of arrays; what has no array is bytes of 1."""
    header, body = {"__metadata__": metadata} if metadata else {}, io.BytesIO()
    for name, x in tensors.items():
        dtype, shape = ("F64" if x.dtype == np.float64 else "F32", x.shape) if isinstance(x, np.ndarray) else x
        start = body.tell()
        body.write(x.tobytes() if isinstance(x, np.ndarray) else b"\1" * (math.prod(shape) * TYPES[dtype]))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, body.tell()]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body.getvalue())
    return path


@pytest.mark.parametrize("dtype", [d for d in TYPES if d not in ("F64", "F32")])
def test_whole_numbers_are_no_weights(dtype, tmp_path, odd):
    model = typed(tmp_path / "m.safetensors", ODD | {KEY: (dtype, (64, 64))})
    message = refused(model)
    assert KEY in message
    assert f"stored as {dtype}" in message
    assert "give the original checkpoint" in message
    lora = {"blocks.0.att.key.lora_A": (dtype, (4, 64)), "blocks.0.att.key.lora_B": (dtype, (64, 4))}
    assert f"blocks.0.att.key.lora_A is stored as {dtype}" in refused(odd, f"{typed(tmp_path / 'l.safetensors', lora)}:4")
    state = typed(tmp_path / "s.safetensors", {f"blocks.{i}.att.time_state": (dtype, (4, 16, 16)) for i in range(2)})
    with pytest.raises(CheckpointError, match=rf"blocks\.0\.att\.time_state is stored as {dtype}"):
        read_initial_state(state, open_checkpoint(odd).spec)


@pytest.mark.parametrize("storage", ["ByteStorage", "CharStorage", "ShortStorage", "IntStorage", "LongStorage", "BoolStorage"])
def test_nor_are_they_in_torch_s_files(storage, tmp_path):
    pickled = factory.tensor_pickle("0", (4, 4), "fp32", storage=storage.encode())
    entries = b"}(" + _text("emb.weight") + pickled + _text("emb.absmax") + factory.tensor_pickle("0", (4,), "fp32") + b"u"
    factory.write_zip(tmp_path / "m.pth", b"\x80\x02" + entries + b".", {"0": bytes(256)})
    message = refused(tmp_path / "m.pth")
    assert f"emb.weight is stored as {storage}" in message
    assert "bitsandbytes" in message


def test_float8_of_torch_is_named(tmp_path):
    pid = b"(" + _text("storage") + b"ctorch.storage\nUntypedStorage\n" + _text("0") + _text("cpu") + _int(16) + b"t"
    args = pid + b"Q" + _int(0) + b"(" + _int(4) + _int(4) + b"t(" + _int(4) + _int(1) + b"t\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v3\n(" + args + b"ctorch\nfloat8_e4m3fn\ntR"
    factory.write_zip(tmp_path / "m.pth", b"\x80\x02}(" + _text("emb.weight") + tensor + b"u.", {"0": bytes(16)})
    message = refused(tmp_path / "m.pth")
    assert "emb.weight is stored as float8_e4m3fn" in message
    assert "fp8" in message


LAYER = "blocks.0.att.key."


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"weight": ("U8", (2048, 1)), "weight.absmax": ("U8", (64,)), "weight.quant_map": ("F32", (16,))}, "bitsandbytes"),
        ({"weight": ("U8", (2048, 1)), "weight.quant_state.bitsandbytes__nf4": ("U8", (90,))}, "bitsandbytes"),
        ({"weight": ("I8", (64, 64)), "SCB": ("F32", (64,))}, "bitsandbytes"),
        (dict.fromkeys(("qweight", "qzeros", "g_idx"), ("I32", (8, 64))) | {"scales": ("F32", (1, 64))}, "GPTQ"),
        (dict.fromkeys(("qweight", "qzeros"), ("I32", (64, 8))) | {"scales": ("F32", (1, 64))}, "AWQ"),
        ({"weight": ("U32", (64, 8)), "scales": ("F32", (64, 1)), "biases": ("F32", (64, 1))}, "mlx"),
        ({"W_q": ("U8", (32, 64)), "scale": ("F32", (64, 1)), "zero": ("F32", (64, 1))}, "HQQ"),
        ({"weight_packed": ("I32", (64, 8)), "weight_scale": ("F32", (64, 1))}, "compressed-tensors"),
        ({"weight": ("F8_E4M3", (64, 64)), "weight_scale_inv": ("F32", (1, 1))}, "fp8"),
        ({"weight": ("F8_E5M2", (64, 64))}, "fp8"),
        ({"weight._data": ("I8", (64, 64)), "weight._scale": ("F32", (64, 1))}, "quanto"),
    ],
)
def test_quantized_formats_are_named(tensors, kind, tmp_path):
    w = {n: x for n, x in ODD.items() if n != f"{LAYER}weight"} | {LAYER + n: t for n, t in tensors.items()}
    message = refused(typed(tmp_path / "m.safetensors", w))
    assert f"quantized by {kind}" in message
    assert LAYER in message


def test_counters_are_left_out_and_float64_is_read(tmp_path):
    double = {n: x.astype(np.float64) for n, x in ODD.items()}
    counters = {"blocks.0.num_batches_tracked": ("I64", ()), "global_step": ("I64", (1,)), "n_averaged": ("F32", ())}
    path = typed(tmp_path / "m.safetensors", double | counters)
    same(path)
    notes = " ".join(open_checkpoint(path).notes)
    assert "blocks.0.num_batches_tracked, global_step, n_averaged" in notes
    assert "float64" in notes
    double[KEY] = double[KEY] * 0 + 1e300
    assert f"{KEY} holds a inf" in refused(typed(tmp_path / "big.safetensors", double))


def test_a_quantized_checkpoint_of_our_own_is_read(odd, tmp_path):
    written = quantize(odd, tmp_path / "q.safetensors", quant="int8")
    q = open_checkpoint(written.path)
    assert q.tensors[KEY].data.dtype == "U8"
    assert np.abs(q.tensors[KEY].read().dequantize() - ODD[KEY]).max() < 0.01


# --- time_first of RWKV-5: BlinkDL's logarithm, or raw from web-rwkv's converter ---

SIZES_5 = dict(n_layer=2, n_head=3, head_size=16, n_ffn=144, n_vocab=61)


def step5(w, u, ids):
    """RWKV-5 in float64, from the paper: logits after the last of these tokens; u is by layer, (H, N)."""
    w = {n: x.astype(np.float64) for n, x in w.items()}
    C, (H, N) = w["emb.weight"].shape[1], u[0].shape
    S, last = [np.zeros((H, N, N)) for _ in u], [np.zeros((2, C)) for _ in u]

    def norm(x, name, eps=1e-5, groups=1):
        x = x.reshape(groups, -1)
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps)
        return x.reshape(-1) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    for t in ids:
        x = norm(w["emb.weight"][t], "blocks.0.ln0")
        for i in range(len(u)):
            a, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
            z, p = norm(x, f"blocks.{i}.ln1"), last[i][0]
            mixed = {c: z * w[f"{a}time_mix_{c}"].reshape(-1) + p * (1 - w[f"{a}time_mix_{c}"].reshape(-1)) for c in "rkvg"}
            last[i][0] = z
            r, k, v = ((w[f"{a}{m}.weight"] @ mixed[m[0]]).reshape(H, N) for m in ("receptance", "key", "value"))
            g = w[f"{a}gate.weight"] @ mixed["g"]
            decay = np.exp(-np.exp(w[f"{a}time_decay"].reshape(H, -1)))
            kv = k[:, :, None] * v[:, None, :]
            y = np.einsum("hk,hkv->hv", r, u[i][:, :, None] * kv + S[i])
            S[i] = kv + decay[:, :, None] * S[i]
            x = x + w[f"{a}output.weight"] @ (norm(y, f"{a}ln_x", 64e-5, H) * g * sigmoid(g))
            z, p = norm(x, f"blocks.{i}.ln2"), last[i][1]
            z_k, z_r = (z * w[f"{f}time_mix_{c}"].reshape(-1) + p * (1 - w[f"{f}time_mix_{c}"].reshape(-1)) for c in "kr")
            last[i][1] = z
            k = np.maximum(w[f"{f}key.weight"] @ z_k, 0) ** 2
            x = x + sigmoid(w[f"{f}receptance.weight"] @ z_r) * (w[f"{f}value.weight"] @ k)
    return w["head.weight"] @ norm(x, "ln_out")


def logits(path, out, ids):
    return open_bundle(export(path, out, quant="none").path).feed(ids)[0]


IDS = factory.tokens(12, 61)


@pytest.mark.parametrize("version", ["5.2", "5.1"])
@pytest.mark.parametrize("container", ["pth", "half pth", "F32", "BF16", "transformers"])
def test_time_first_is_a_logarithm(container, version, tmp_path):
    w = {n.replace("time_faaaa", "time_first"): x for n, x in factory.weights(version, **SIZES_5).items()}
    if container == "transformers":
        path, dtype = factory.write_folder(tmp_path / "m", factory.transformers(w), "fp16"), "fp16"
    elif "pth" in container:
        dtype = "fp16" if container == "half pth" else "fp32"
        path = write_pth(tmp_path / "m.pth", w, dtype)
    else:
        dtype = {"F32": "fp32", "BF16": "bf16"}[container]
        path = write_safetensors(tmp_path / "m.st", w, container)  # the name says nothing
    w = {n: factory.as_stored(x, dtype) for n, x in w.items()}
    u = [np.exp(w[f"blocks.{i}.att.time_first"].astype(np.float64)).reshape(3, -1) * np.ones((3, 16)) for i in range(2)]
    assert apart(logits(path, tmp_path / "out", IDS), step5(w, u, IDS)) <= GRAPH


@pytest.mark.parametrize("name", ["m.st", "m.safetensors", "m.pth"])
def test_web_rwkv_s_time_first_is_raw_whatever_the_file_is_called(name, tmp_path):
    w = factory.weights("5.2", **SIZES_5)
    path = write_safetensors(tmp_path / name, factory.web_rwkv(w), "F16")
    w = {n: factory.as_stored(x, "fp16") for n, x in w.items()}
    u = [w[f"blocks.{i}.att.time_faaaa"].astype(np.float64) for i in range(2)]
    assert apart(logits(path, tmp_path / "out", IDS), step5(w, u, IDS)) <= GRAPH
    assert any("att.time_first is read as it is" in note for note in open_checkpoint(path).notes)


def test_what_nothing_tells_is_refused(tmp_path):
    """One value a head, float16 throughout: the converter's or BlinkDL's."""
    w = {n.replace("time_faaaa", "time_first"): x for n, x in factory.weights("5.1", **SIZES_5).items()}
    message = refused(write_safetensors(tmp_path / "m.safetensors", w, "F16"))
    assert "blocks.0.att.time_first" in message
    assert "Give the .pth" in message


# --- PiSSA, MiSS, DiSHA, Bone, Bat ---


def factors(w, r=4, scale=0.05, modules=("att.key", "ffn.key", "ffn.value")):
    return {
        n.removesuffix("weight") + f"lora_{c}": scale * factory.uniform(n + c, (r, x.shape[1]) if c == "A" else (x.shape[0], r))
        for n, x in w.items()
        if n.endswith(tuple(f"{m}.weight" for m in modules))
        for c in "AB"
    }


def svd_factors(w, r=4, **more):
    """What PiSSA begins from: the largest singular values, half in each factor."""
    start = factors(w, r, **more)
    for name in [n.removesuffix(".lora_A") for n in start if n.endswith("lora_A")]:
        U, s, Vt = np.linalg.svd(w[f"{name}.weight"].astype(np.float64), full_matrices=False)
        start[f"{name}.lora_B"] = (U[:, :r] * np.sqrt(s[:r])).astype(np.float32)
        start[f"{name}.lora_A"] = (np.sqrt(s[:r])[:, None] * Vt[:r]).astype(np.float32)
    return start


def begun(start, prefix=""):
    return {f"{prefix}{n.replace('.lora_', '.init_lora_')}": x for n, x in start.items()}


def check_merge(merged, expected):
    """Matrices are the expected ones to float32's rounding, and the rest is as it was."""
    for n, x in expected.items():
        np.testing.assert_allclose(merged[n], x, atol=2e-6, err_msg=n)
        assert np.abs(merged[n] - ODD[n]).max() > 0.01, n
    plain = {n: x for n, x in ODD.items() if n.endswith(".weight")}
    for n in plain.keys() - expected.keys():
        np.testing.assert_array_equal(merged[n], ODD[n], err_msg=n)


@pytest.mark.parametrize("how", ["beside", "beside, with an alpha", "early name", "named"])
def test_pissa_is_merged_with_what_it_began_from(how, odd, tmp_path):
    start = svd_factors(ODD)
    trained = {n: x + y for (n, x), y in zip(start.items(), factors(ODD, scale=0.03).values(), strict=True)}
    lora = write_pth(tmp_path / "rwkv-0.pth", trained, "fp32")
    name = {"early name": "init_lora.pth", "named": "elsewhere.pth"}.get(how, "init_pissa.pth")
    init = write_pth(tmp_path / name, begun(start, "model."), "fp32")
    given = {"named": f"{lora}:{init}", "beside, with an alpha": f"{lora}:16"}.get(how, lora)
    expected = {}
    for n in [n.removesuffix("lora_A") for n in start if n.endswith("lora_A")]:
        W, A, B, A0, B0 = (
            np.asarray(x, np.float64)
            for x in (ODD[f"{n}weight"], trained[f"{n}lora_A"], trained[f"{n}lora_B"], start[f"{n}lora_A"], start[f"{n}lora_B"])
        )
        expected[f"{n}weight"] = W - B0 @ A0 + B @ A
    check_merge(reading(odd, given), expected)
    (note,) = with_lora(open_checkpoint(odd), given).notes
    assert f"PiSSA, 6 matrices of rank 4 merged, begun from {name}" in note
    assert ("Alpha is not used" in note) == (how == "beside, with an alpha")


def test_a_pissa_without_its_start_is_refused(odd, tmp_path):
    trained = {n: x + 0.005 * factory.uniform(n + "t", x.shape) for n, x in svd_factors(ODD).items()}
    lora = write_pth(tmp_path / "rwkv-0.pth", trained, "fp32")
    for given in (lora, f"{lora}:8"):
        assert "seems to be a PiSSA" in refused(odd, given)
        assert "init_pissa.pth" in refused(odd, given)
    named = write_pth(tmp_path / "my-pissa.pth", factors(ODD), "fp32")
    assert "seems to be a PiSSA (by its name)" in refused(odd, f"{named}:8")
    other = begun({n: x for n, x in trained.items() if not n.startswith("blocks.1.")})
    write_pth(tmp_path / "init_pissa.pth", other, "fp32")
    assert "init_pissa.pth is not what this PiSSA began from" in refused(odd, f"{lora}:8")


def test_a_plain_lora_is_no_pissa(odd, tmp_path):
    """Rows of A are of one length, B is whatever training made of 0."""
    for scale in (0.01, 0.3, 1.0):
        lora = factors(ODD, r=8)
        lora |= {n: factory.uniform(n, x.shape, -scale, scale) for n, x in lora.items() if n.endswith("B")}
        given = write_pth(tmp_path / "lora.pth", lora, "fp32")
        n = "blocks.1.att.key."
        expected = ODD[f"{n}weight"] + 0.5 * lora[f"{n}lora_B"].astype(np.float64) @ lora[f"{n}lora_A"]
        np.testing.assert_allclose(reading(odd, f"{given}:4")[f"{n}weight"], expected, atol=2e-6)


def shards(key, r, m=None):
    """D (r, outputs) for some matrices, and what the formula makes of them, W[o, j] + D[j mod r, o mod m]."""
    found, expected = {}, {}
    for n in (KEY, FFN, "blocks.1.ffn.value.weight"):
        W = ODD[n].astype(np.float64)
        D = factory.uniform(n + "D", (r, m or len(W)), -0.3, 0.3)
        expected[n] = np.array([[W[o, j] + D[j % r, o % D.shape[1]] for j in range(W.shape[1])] for o in range(len(W))])
        found[n.removesuffix("weight") + key] = D
    return found, expected


@pytest.mark.parametrize("key", ["bone", "disha", "miss_block", "bone_block"])
@pytest.mark.parametrize("r", [8, 6])  # a divisor of the inputs, and not
def test_miss_and_what_it_was_called_before(key, r, odd, tmp_path):
    found, expected = shards(key, r)
    given = write_pth(tmp_path / "rwkv-0.pth", {f"model.{n}": x for n, x in found.items()}, "fp32")
    check_merge(reading(odd, given), expected)
    called = {"disha": "DiSHA", "miss_block": "MiSS"}.get(key, "Bone")
    assert f"{called}, 3 matrices of rank {r} merged" in with_lora(open_checkpoint(odd), given).notes[0]


def blocks(key, r, along, names=(KEY, FFN, "blocks.1.ffn.value.weight")):
    """D (n, r, r), and W_b + W_b D_b + D_b for every block, one D for the blocks of the same inputs, or outputs."""
    found, expected = {}, {}
    for n in names:
        W = ODD[n].astype(np.float64)
        D = factory.uniform(n + "D", (W.shape[along == "inputs"] // r, r, r), -0.2, 0.2)
        expected[n] = W.copy()
        for i in range(W.shape[0] // r):
            for j in range(W.shape[1] // r):
                W_b, D_b = W[i * r : (i + 1) * r, j * r : (j + 1) * r], D[j if along == "inputs" else i].astype(np.float64)
                expected[n][i * r : (i + 1) * r, j * r : (j + 1) * r] = W_b + W_b @ D_b + D_b
        found[n.removesuffix("weight") + key] = D
    return found, expected


@pytest.mark.parametrize(
    ("key", "along"),
    [("disha", "inputs"), ("bone", "inputs"), ("bone", "outputs"), ("miss_block", "outputs"), ("bone_block", "outputs")],
)
def test_blocks(key, along, odd, tmp_path):
    found, expected = blocks(key, 16, along)
    given = write_pth(tmp_path / "rwkv-0.pth", found, "fp32")
    merged = with_lora(open_checkpoint(odd), given)
    check_merge({n: t.read() for n, t in merged.tensors.items()}, expected)
    t = merged.tensors[FFN]
    for step in (1, 7, 100):
        rows = [t.rows(i, min(i + step, 192)) for i in range(0, 192, step)]
        np.testing.assert_array_equal(np.concatenate(rows), t.read())


def test_blocks_that_square_matrices_leave_open_are_refused(odd, tmp_path):
    found, _ = blocks("bone", 16, "inputs", [KEY])
    message = refused(odd, write_pth(tmp_path / "rwkv-0.pth", found, "fp32"))
    assert "Bone adapter of blocks" in message
    assert "merge_bone.py" in message
    found, _ = blocks("disha", 16, "outputs", [FFN])
    assert "blocks.0.ffn.key has disha (12, 16, 16), expected (r, 192)" in refused(odd, write_pth(tmp_path / "d.pth", found))
    early = {"blocks.0.ffn.key.bone": np.ones((192, 8), np.float32)}
    assert "an early form that is not supported" in refused(odd, write_pth(tmp_path / "e.pth", early))


def peft_folder(folder, tensors, settings, container="safetensors"):
    folder.mkdir()
    named = {f"base_model.model.{n}": x for n, x in tensors.items()}
    if container == "bin":
        write_pth(folder / "adapter_model.bin", named, "fp32")
    else:
        write_safetensors(folder / "adapter_model.safetensors", named, "F32")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("container", ["bin", "safetensors"])
@pytest.mark.parametrize("kind", ["MISS", "MISS bat", "MISS mini", "BONE", "BONE bat"])
def test_peft_s_folders_of_miss_and_bone(kind, container, odd, tmp_path):
    peft_type, *how = kind.split()
    key = f"{peft_type.lower()}_block"
    found, expected = blocks(key, 16, "outputs") if how == ["bat"] else shards(key, 8, 16 if how == ["mini"] else None)
    settings = {"peft_type": peft_type, "r": 8, "init_weights": how[0] if how else True, "mini_r": 16}
    check_merge(reading(odd, peft_folder(tmp_path / "adapter", found, settings, container)), expected)


def test_peft_s_folder_with_a_bin(odd, tmp_path):
    lora = factors(ODD, scale=0.5)
    folder = peft_folder(
        tmp_path / "adapter", {f"{n}.weight": x for n, x in lora.items()}, {"peft_type": "LORA", "r": 4, "lora_alpha": 6}, "bin"
    )
    expected = {}
    for n in [n.removesuffix("lora_A") for n in lora if n.endswith("lora_A")]:
        expected[f"{n}weight"] = ODD[f"{n}weight"] + 1.5 * lora[f"{n}lora_B"].astype(np.float64) @ lora[f"{n}lora_A"]
    check_merge(reading(odd, folder), expected)


@pytest.mark.parametrize(("key", "kind"), [("lora_M", "DoRA"), ("lora_a", "LoRA of mlx-lm")])
def test_other_adapters_are_named(key, kind, odd, tmp_path):
    tensors = factors(ODD) | {f"blocks.0.att.key.{key}": np.ones((1, 64), np.float32)}
    assert f"is a {kind}" in refused(odd, f"{write_pth(tmp_path / 'l.pth', tensors)}:4")


# --- names ---

STACKS = [
    *("model.", "module.", "_forward_module.model.", "base_model.model.", "_orig_mod.", "model.base_model.model."),
    *("_orig_mod.module.model.", "module._orig_mod.", "_forward_module.module._orig_mod.model.", "model._orig_mod."),
]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("layout", ["official", "fla", "transformers", "v6"])
@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_wrappers_around_a_model_s_names(stack, layout, container, tmp_path):
    w = factory.weights(**factory.SHAPES["v6"]) if layout in ("v6", "transformers") else ODD
    named = {"fla": factory.fla, "transformers": factory.transformers}.get(layout, dict)(w)
    named = {stack + n: x for n, x in named.items()}
    write = {"pth": lambda p: write_pth(p, named, "fp32"), "safetensors": lambda p: write_safetensors(p, named, "F32")}
    same(write[container](tmp_path / "m"), w)


@pytest.mark.parametrize("between", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_between_the_parts_of_a_name(between, tmp_path):
    same(write_pth(tmp_path / "m.pth", {n.replace(".att.", f".{between}att."): x for n, x in ODD.items()}, "fp32"))


@pytest.mark.parametrize("stack", STACKS)
def test_wrappers_around_an_adapter_s_and_a_state_s_names(stack, odd, tmp_path):
    lora = factors(ODD, scale=0.5)
    given = write_pth(tmp_path / "lora.pth", {stack + n: x for n, x in lora.items()}, "fp32")
    n = "blocks.1.ffn.value."
    expected = ODD[f"{n}weight"] + 2 * lora[f"{n}lora_B"].astype(np.float64) @ lora[f"{n}lora_A"]
    np.testing.assert_allclose(reading(odd, f"{given}:8")[f"{n}weight"], expected, atol=2e-6)
    S = {f"blocks.{i}.att.time_state": factory.uniform(f"S{i}", (4, 16, 16)) for i in range(2)}
    state = read_initial_state(
        write_pth(tmp_path / "s.pth", {stack + n: x for n, x in S.items()}, "fp32"), open_checkpoint(odd).spec
    )
    for i in range(2):
        np.testing.assert_array_equal(state[f"{i}.wkv"], S[f"blocks.{i}.att.time_state"])


def mlx(w):
    """As mlx-lm's convert writes an fla folder: its sanitize gives the heads an axis."""
    w = factory.fla(w)
    by_heads = (".k_k", ".k_a", ".g_norm.weight", ".g_norm.bias")
    return {n: x.reshape(4, 16) if n.endswith(by_heads) else x for n, x in w.items()}


def test_an_unquantized_conversion_of_mlx_lm(tmp_path):
    same(factory.write_folder(tmp_path / "mlx", mlx(ODD), "fp32"))


# --- weights among other things ---


def entry(key, content):
    return _text(key) + content


def counter(n=5):
    return factory.tensor_pickle("0", (), "fp32", storage=b"LongStorage") if n is None else _int(n)


def zeros(names):
    """A dictionary with tensors of one number; which no weights are, if they are taken."""
    return b"}(" + b"".join(_text(n) + factory.tensor_pickle("0", (1, 2), "fp32") for n in names) + b"u"


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "weights", "my_model", "model_state"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_weights_one_level_down(key, where, tmp_path):
    others = (
        entry("step", counter())
        + entry("global_step", counter(None))
        + entry("rng", factory.tensor_pickle("0", (8,), "fp32", storage=b"ByteStorage"))
        + entry("model_ema", zeros(["blocks.0.att.key.weight", "emb.weight"]))
        + entry("optimizer", b"}(" + _text("state") + zeros(["0.exp_avg"]) + b"u")
        + entry("dtype", b"ctorch\nbfloat16\n")
        + entry("device", b"ctorch\ndevice\n(" + _text("cpu") + b"tR")
    )

    def inside(d):
        d = entry(key, d)
        return b"}(" + (others + d if where == "before" else d + others) + b"u"

    path = write_pth(tmp_path / "m.pth", ODD, "fp32", inside)
    same(path)
    (note,) = open_checkpoint(path).notes
    assert f"taken from '{key}'" in note
    assert "'model_ema'" in note


def test_a_moving_average_alone_is_read_and_said(tmp_path):
    path = write_pth(tmp_path / "m.pth", ODD, "fp32", lambda d: b"}(" + entry("step", counter()) + entry("ema", d) + b"u")
    same(path)
    assert "'ema', a moving average" in open_checkpoint(path).notes[0]


def test_a_moving_average_beside_the_weights_in_one_dictionary(tmp_path):
    w = {f"model.{n}": x for n, x in ODD.items()} | {f"ema.{n}": 0 * x for n, x in ODD.items()}
    path = write_safetensors(tmp_path / "m.safetensors", w, "F32")
    same(path)
    assert "moving average (ema.)" in open_checkpoint(path).notes[0]


def test_counters_beside_weights_at_the_top(tmp_path):
    def inside(d):
        return d.removesuffix(b"u") + entry("global_step", counter(None)) + entry("rng_state", zeros(["a.b"])) + b"u"

    path = write_pth(tmp_path / "m.pth", ODD, "fp32", inside)
    same(path)
    assert "global_step" in " ".join(open_checkpoint(path).notes)


def namespace(name=b"argparse\nNamespace"):
    """As pickle writes one: a new object, and its attributes."""
    return b"c" + name + b"\n)\x81}(" + _text("lr") + b"G?\x50bM\xd2\xf1\xa9\xfc" + _text("name") + _text("x") + b"ub"


@pytest.mark.parametrize("name", [b"argparse\nNamespace", b"omegaconf.dictconfig\nDictConfig", b"types\nSimpleNamespace"])
def test_a_training_checkpoint_with_objects_says_how_to_save_the_weights(name, tmp_path):
    path = tmp_path / "epoch.ckpt"
    for inside in (
        lambda d: b"}(" + entry("hyper_parameters", namespace(name)) + entry("state_dict", d) + b"u",
        lambda d: b"}(" + entry("state_dict", d) + entry("hyper_parameters", namespace(name)) + b"u",
    ):
        message = refused(write_pth(path, ODD, "fp32", inside))
        assert name.decode().replace("\n", ".") in message
        assert "torch.save(torch.load('epoch.ckpt', weights_only=False)['state_dict'], 'weights.pth')" in message
        assert "malicious" not in message


def test_a_harmless_object_hides_no_other(tmp_path):
    def inside(d):
        attack = b"cos\nsystem\n(" + _text("true") + b"tR"
        return b"}(" + entry("args", namespace()) + entry("state_dict", d) + entry("x", attack) + b"u"

    message = refused(write_pth(tmp_path / "m.pth", ODD, "fp32", inside))
    assert "os.system, which no weights need: it may be malicious" in message
    assert "torch.load" not in message


# --- a tuned state inside a model's file ---


def tuned(n_layer=2):
    return {f"blocks.{i}.att.time_state": factory.uniform(f"T{i}", (4, 16, 16)) for i in range(n_layer)}


def first_of(bundle):
    return open_bundle(bundle).first.tensors


def test_a_tuned_state_inside_a_model_is_its_initial_state(odd, tmp_path):
    S, other = tuned(), {n: -x for n, x in tuned().items()}
    path = write_pth(tmp_path / "tuned.pth", {f"model.{n}": x for n, x in (ODD | S).items()}, "fp32")
    alone = write_pth(tmp_path / "state.pth", S, "fp32")
    written = export(path, tmp_path / "a", quant="int8")
    reference = export(odd, tmp_path / "b", quant="int8", initial_state=alone)
    assert {f.name: f.read_bytes() for f in written.path.iterdir()} == {
        f.name: f.read_bytes() for f in reference.path.iterdir()
    }
    assert any("tuned state in tuned.pth" in note for note in written.notes)
    assert model_id(open_checkpoint(path)) == model_id(open_checkpoint(odd))
    again = export(path, tmp_path / "c", quant="int8", initial_state=write_pth(tmp_path / "other.pth", other, "fp32"))
    np.testing.assert_array_equal(first_of(again.path)["1.wkv"], other["blocks.1.att.time_state"])
    assert any("other.pth replaced" in note for note in again.notes)


def test_a_quantized_checkpoint_keeps_the_tuned_state(tmp_path):
    S = tuned()
    path = write_pth(tmp_path / "tuned.pth", ODD | S, "fp32")
    q = quantize(path, tmp_path / "q.safetensors", quant="int4")
    exported = export(q.path, tmp_path / "a")
    direct = export(path, tmp_path / "b", quant="int4")
    assert {f.name: f.read_bytes() for f in exported.path.iterdir()} == {f.name: f.read_bytes() for f in direct.path.iterdir()}
    np.testing.assert_array_equal(first_of(exported.path)["0.wkv"], S["blocks.0.att.time_state"])
    again = quantize(write_pth(tmp_path / "plain.pth", ODD, "fp32"), tmp_path / "p.safetensors", quant="int4")
    assert again.model_id == q.model_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.att.time_state"), "a tuned state for 1 layers, expected 2 ('blocks.1.att.time_state')"),
        (
            lambda w: w.update({"blocks.1.att.time_state": np.ones((4, 16, 8), np.float32)}),
            "has shape (4, 16, 8), expected",
        ),
    ],
)
def test_a_tuned_state_that_does_not_fit_is_refused(change, message, tmp_path):
    w = ODD | tuned()
    change(w)
    assert message in refused(write_pth(tmp_path / "m.pth", w, "fp32"))


def test_a_tuned_state_whose_axes_may_be_exchanged_is_refused(odd, tmp_path):
    """Some of web-rwkv's converters exchange them, all write float16."""
    for w in (factory.web_rwkv(ODD) | tuned(), ODD | tuned()):
        assert "whether they exchange its axes: give the .pth" in refused(write_safetensors(tmp_path / "m.st", w, "F16"))
    state = write_safetensors(tmp_path / "state.safetensors", tuned(), "F16")
    with pytest.raises(CheckpointError, match="whether its axes are exchanged: give the"):
        read_initial_state(state, open_checkpoint(odd).spec)


# --- files that are something else ---

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 382\n"
GGML = struct.pack("<IIIIIII", 0x67676D66, 101, 50277, 768, 12, 1, 0)


def tar_file():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as t:
        t.addfile(tarfile.TarInfo("m.pth"), io.BytesIO())
    return data.getvalue()


def zip_file(*names):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        for name in names:
            z.writestr(name, "x")
    return data.getvalue()


OTHERS = [
    (POINTER, "Git LFS pointer", "git lfs pull"),
    (b"<!DOCTYPE html>\n<html><head>", "web page", "download the file itself"),
    (b"\n  <html lang='en'>", "web page", "download the file itself"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML", "download the file itself"),
    (b'{"error":"Repository not found"}', "server's error", "download the file itself"),
    (b"Entry not found", "server's error", "download the file itself"),
    (b"", "is empty", "download it again"),
    (zip_file("model.pth", "README"), "zip file", "Unpack it"),
    (zip_file("emb.weight.npy"), ".npz", "give the .pth or safetensors"),
    (tar_file(), "tar archive", "unpack it"),
    (gzip.compress(b"x"), "gzip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(64), "7-Zip archive", "unpack it"),
    (b"Rar!\x1a\x07\1\0" + bytes(64), "RAR archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd" + bytes(64), "Zstandard archive", "unpack it"),
    (b"\xfd7zXZ\0" + bytes(64), "xz archive", "unpack it"),
    (b"BZh91AY&SY" + bytes(64), "bzip2 archive", "unpack it"),
    (GGML, "rwkv.cpp", "give the .pth or safetensors"),
    (struct.pack("<I", 0x67676D6C) + bytes(64), "ggml", "give the .pth or safetensors"),
    (struct.pack("<II", 0x67676A74, 3) + bytes(64), "ggml", "give the .pth or safetensors"),
    (struct.pack("<II", 0x67676C61, 1) + bytes(64), "ggml LoRA", "give the LoRA"),
    (b"\x08\x0a\x12\x07pytorch\x1a\x052.1.0" + bytes(64), "ONNX", "give the .pth or safetensors"),
    (b"\x93NUMPY\1\0v\0{'descr'", "numpy", "give the .pth or safetensors"),
    (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5", "give the .pth or safetensors"),
    (b"\x1c\0\0\0TFL3" + bytes(64), "TensorFlow Lite", "give the .pth or safetensors"),
    (b"\x81\xa6params\x83\xa6blocks", "Flax", "give the .pth or safetensors"),
]


@pytest.mark.parametrize(("data", "what", "advice"), OTHERS, ids=[what for _, what, _ in OTHERS])
def test_other_files_are_named_with_what_to_do(data, what, advice, odd, tmp_path):
    path = tmp_path / "rwkv7.pth"
    path.write_bytes(data)
    for message in (refused(path), refused(odd, f"{path}:4")):
        assert str(path) in message
        assert what in message
        assert advice in message
    with pytest.raises(CheckpointError, match=what.replace(".", r"\.")):
        read_initial_state(path, open_checkpoint(odd).spec)
    shown = CliRunner().invoke(cli, ["export", str(path), "-o", str(tmp_path / "out")])
    assert shown.exit_code == 1
    assert len(shown.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_pointer_among_the_files_of_a_folder(name, tmp_path):
    w = {n: x for n, x in ODD.items() if n != "head.weight"}
    folder = factory.write_folder(tmp_path / "m", factory.fla(w), n_shards=2, config={"tie_word_embeddings": True})
    (folder / name).write_bytes(POINTER)
    message = refused(folder)
    assert name in message
    assert "Git LFS pointer" in message


def test_a_pointer_as_the_one_checkpoint_of_a_folder(tmp_path):
    (tmp_path / "rwkv7.pth").write_bytes(POINTER)
    assert "Git LFS pointer" in refused(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_pointer_as_a_tokenizer(name, odd, tmp_path):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(RwkvEdgeError, match="Git LFS pointer"):
        export(odd, tmp_path / "out", tokenizer=tmp_path / name)


def test_a_lora_in_gguf_is_named(tmp_path):
    about = {"general.type": "adapter", "general.architecture": "rwkv7", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(about))
    head += b"".join(gguf_entry(k, gguf_value(v)) for k, v in about.items())
    head += gguf_tensor("blk.0.time_mix_key.weight.lora_a", (4, 64), 0, 0)
    (tmp_path / "m.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(1024))
    message = refused(tmp_path / "m.gguf")
    assert "general.type is 'adapter'" in message
    assert "--lora" in message


def test_a_deepspeed_folder_and_a_script_archive_are_named(tmp_path):
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert "run the zero_to_fp32.py" in refused(tmp_path)
    (tmp_path / "m.pt").write_bytes(zip_file("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"))
    assert "TorchScript" in refused(tmp_path / "m.pt")


def test_tensors_of_torch_s_own_kinds_are_named(tmp_path):
    tensor = b"ctorch._utils\n_rebuild_qtensor\n(" + _int(0) + b"tR"
    factory.write_zip(tmp_path / "m.pth", b"\x80\x02}(" + _text("emb.weight") + tensor + b"u.", {})
    message = refused(tmp_path / "m.pth")
    assert "quantized" in message
    assert "_rebuild_qtensor" in message
