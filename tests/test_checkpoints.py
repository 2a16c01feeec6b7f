"""Reading what people download: every dtype, no torch, no code run, nothing held whole, one line for what is wrong."""

import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import factory
import numpy as np
import pytest
from conftest import DEMO
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_edge.checkpoints import model_id, open_checkpoint
from rwkv_edge.convert import export, quantize
from rwkv_edge.errors import CheckpointError, OutputError, RwkvEdgeError
from rwkv_edge.models import detect

ODD = factory.weights(**factory.SHAPES["odd"])


def write(folder, w, dtype="fp32"):
    return factory.write_pth(folder / "model.pth", w, dtype)


def refused(path):
    """The message with which a file is refused: one line."""
    with pytest.raises(CheckpointError) as e:
        checkpoint = open_checkpoint(path)
        for t in checkpoint.tensors.values():
            t.read()
    message = str(e.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_every_tensor_is_read_exactly(container, dtype, tmp_path):
    if container == "pth":
        path = write(tmp_path, ODD, dtype)
    else:
        path = factory.write_safetensors(tmp_path / "m.safetensors", ODD, {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype])
    checkpoint = open_checkpoint(path)
    unused = {f"blocks.0.att.v{i}" for i in "012"}
    assert set(checkpoint.tensors) == set(ODD) - unused
    for name, t in checkpoint.tensors.items():
        expected = factory.as_stored(ODD[name], dtype)
        if re.search(r"att\.[wavg][12]$", name):
            expected = expected.T
        np.testing.assert_array_equal(t.read(), expected.reshape(t.shape), err_msg=name)
        middle = t.shape[0] // 2
        parts = [t.rows(0, middle), t.rows(middle, t.shape[0])]
        np.testing.assert_array_equal(np.concatenate(parts), t.read())


def test_sizes_are_read_from_shapes():
    spec = open_checkpoint(DEMO).spec
    assert spec.sizes == {
        "version": "7", "n_layer": 6, "n_embd": 256, "n_head": 4, "head_size": 64, "n_ffn": 1024, "n_vocab": 4096
    }  # fmt: skip
    assert spec.n_parameters == 7_337_472 - 256 - 2 * 256 * 32  # all but layer 0's unused v0 v1 v2


def test_reading_holds_no_whole_tensor(tmp_path):
    """The largest tensor of this checkpoint is 64 MB; the process that quantizes it stays far below its sum."""
    shape = dict(n_layer=1, n_head=4, head_size=64, n_ffn=256, n_vocab=1, ranks=(8, 8, 8, 8), layer0_v=False)
    w = factory.weights(**shape)
    w["emb.weight"] = w["head.weight"] = np.broadcast_to(np.float32(0.5), (65536, 256))
    path = write(tmp_path, w)
    code = (
        "import resource, sys, rwkv_edge.convert as c\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import numpy, rwkv_edge.tokenizer; before = peak()\n"
        "c.quantize(sys.argv[1], sys.argv[2]); print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, path, tmp_path / "q"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100_000  # kB; the float32 weights are 137 MB


def test_the_id_is_of_the_weights_not_of_the_file(tmp_path):
    a = model_id(open_checkpoint(write(tmp_path, ODD)))
    shuffled = factory.write_pth(tmp_path / "b.pth", dict(sorted(ODD.items(), reverse=True)), "fp32")
    assert model_id(open_checkpoint(shuffled)) == a
    unused = {n: x for n, x in ODD.items() if not n.startswith("blocks.0.att.v")}
    unused["blocks.0.att.value.weight"] = ODD["blocks.0.att.value.weight"]
    assert model_id(open_checkpoint(factory.write_pth(tmp_path / "c.pth", unused, "fp32"))) == a
    changed = ODD | {"ln_out.bias": ODD["ln_out.bias"] + 1}
    assert model_id(open_checkpoint(factory.write_pth(tmp_path / "d.pth", changed, "fp32"))) != a


def test_a_quantized_checkpoint_keeps_id_and_numbers(tmp_path):
    source = write(tmp_path, ODD)
    done = []
    written = quantize(source, tmp_path / "q.safetensors", quant="int4", progress=lambda n, total: done.append((n, total)))
    q, original = open_checkpoint(written.path), open_checkpoint(source)
    assert q.quantized
    assert q.known_id == written.model_id == model_id(original)
    assert done[-1][0] == done[-1][1] == original.spec.n_parameters
    for name, t in q.tensors.items():
        x, y = t.read(), original.tensors[name].read()
        if t.block:
            assert np.abs(x.dequantize() - y).max() < np.abs(y).max() / 4
        else:
            np.testing.assert_array_equal(x, y)


def test_a_damaged_quantized_checkpoint_is_found(tmp_path):
    written = quantize(write(tmp_path, ODD), tmp_path / "q.safetensors", quant="int4")
    data = written.path.read_bytes()
    written.path.write_bytes(data[:-999] + bytes([data[-999] ^ 1]) + data[-998:])
    with pytest.raises(CheckpointError, match="is damaged: its sha256 is not the one it states"):
        export(written.path, tmp_path / "out")
    with pytest.raises(OutputError, match="is the checkpoint itself: choose another output"):
        quantize(tmp_path / "model.pth", tmp_path / "model.pth", force=True)


def test_a_folder_s_own_shards_are_never_replaced(tmp_path):
    folder = factory.write_folder(tmp_path / "hf", ODD, n_shards=2)
    shard = min(folder.glob("*.safetensors"))
    with pytest.raises(OutputError, match="is the checkpoint itself: choose another output"):
        quantize(folder, shard, force=True)
    assert open_checkpoint(folder).spec.version == "7"


# --- what is refused ---


def test_files_that_are_not_there_or_not_checkpoints(tmp_path):
    known = "model.safetensors, pytorch_model.bin, *.pth, *.pt, *.st, *.safetensors, *.gguf"
    os.mkfifo(tmp_path / "fifo")
    assert refused(tmp_path / "fifo") == f"{tmp_path / 'fifo'} is no regular file"
    assert refused(tmp_path / "none.pth") == f"{tmp_path / 'none.pth'} does not exist"
    assert refused(tmp_path) == f"{tmp_path} is a folder without a checkpoint ({known}): give the checkpoint"
    contents = {
        "": "is empty: download it again",
        "hello": "is neither a torch checkpoint (.pth) nor safetensors",
        "GGUF....": "is damaged or cut short",
    }
    for text, message in contents.items():
        (tmp_path / "f").write_text(text)
        assert message in refused(tmp_path / "f")
    (tmp_path / "f").write_bytes(pickle.dumps({"a": 1}, 2))
    assert "is a legacy torch file (before 1.6)" in refused(tmp_path / "f")
    with zipfile.ZipFile(tmp_path / "z", "w") as z:
        z.writestr("readme.txt", "hello")
    assert "a zip file, but no torch checkpoint" in refused(tmp_path / "z")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(share, tmp_path):
    for path in (write(tmp_path, ODD), factory.write_safetensors(tmp_path / "m.safetensors", ODD)):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        assert re.search("damaged|cut short", refused(path))


class Evil:
    def __init__(self, target, *args):
        self.target, self.args = target, args

    def __reduce__(self):
        return self.target, self.args


@pytest.mark.parametrize("module", ["os", "builtins", "subprocess", "torch.hub", "numpy"])
def test_a_malicious_pickle_runs_nothing(module, tmp_path):
    import builtins
    import os

    marker = tmp_path / "it-ran"
    attack = {
        "os": Evil(os.system, f"touch {marker}"),
        "builtins": Evil(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "subprocess": Evil(subprocess.call, ["touch", str(marker)]),
        "torch.hub": b"\x80\x02ctorch.hub\nload_state_dict_from_url\nX\x01\x00\x00\x00a\x85R.",
        "numpy": Evil(np.zeros, 3),
    }[module]
    data = attack if isinstance(attack, bytes) else pickle.dumps({"emb.weight": attack}, 2)
    factory.write_zip(tmp_path / "evil.pth", data, {})
    assert "which no weights need: it may be malicious" in refused(tmp_path / "evil.pth")
    assert not marker.exists()


NESTED = b"K\x01q\x00" + 60 * b"h\x00h\x00\x86q\x00"  # a pair of pairs of pairs: 2^60 numbers, if one looks at all
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
ORDERED = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NESTED + b"h\x00\x93", "asks for something that is no name"),
        (NESTED + b")R", "its pickle calls a tuple"),
        (STORAGE + b"h\x00tQ", "describes data that cannot be"),
        (STORAGE + 17 * b"N" + b"tQ", "has a tuple as arguments"),
        (ORDERED + b"}R", "has a dict as arguments"),
        (
            b"}q\x01(" + b"".join(factory._int(i) + b"N" for i in range(99)) + b"u" + 99 * (ORDERED + b"h\x01\x85R"),
            "copies more than",
        ),
        (factory.tensor_pickle("0", 17 * (1,), "fp32"), "has a tuple as arguments"),
    ],
)
def test_a_small_pickle_cannot_hang_or_fill_the_memory(content, message, tmp_path):
    head = NESTED if content.startswith(STORAGE) else b""
    factory.write_zip(tmp_path / "m.pth", b"\x80\x02" + head + content + b".", {"0": b"\0" * 4})
    assert message in refused(tmp_path / "m.pth")


def one_tensor(path, pickled, record=b"\0" * 64, **kwargs):
    factory.write_zip(path, b"\x80\x02}(" + factory._text("blocks.0.att.r_k") + pickled + b"u.", {"0": record})
    return path


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (factory.tensor_pickle("0", (100, 100), "fp32"), "does not fit its 64 bytes of data"),
        (factory.tensor_pickle("0", (4, 4), "fp32", offset=1), "does not fit its 64 bytes of data"),
        (factory.tensor_pickle("0", (4, 4), "fp32", offset=-1), "describes a tensor that cannot be"),
        (factory.tensor_pickle("0", (0, 4), "fp32"), "does not fit its 64 bytes of data"),
        (factory.tensor_pickle("0", (4, 4), "fp32", stride=(1, 4)), "is not stored in row order"),
        (factory.tensor_pickle("1", (4, 4), "fp32"), "has no data in the file"),
        (factory.tensor_pickle("0", (4, 4), "fp32", storage=b"LongStorage"), "stored as LongStorage: only float32"),
        (b"", "is damaged or cut short"),
        (b"\xff\xff", "is damaged or cut short"),
    ],
)
def test_tensors_that_lie_about_themselves(pickled, message, tmp_path):
    assert message in refused(one_tensor(tmp_path / "m.pth", pickled))


@pytest.mark.parametrize(
    ("squeezed", "message"),
    [
        ("archive/data/0", "emb.weight is compressed: load and save it once with torch.save"),
        ("archive/data.pkl", "data.pkl has 168 bytes or is compressed: no torch checkpoint"),
    ],
)
def test_compressed_records(squeezed, message, tmp_path):
    body = factory._text("emb.weight") + factory.tensor_pickle("0", (4, 4), "fp32")
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as z:
        for name, data in (("archive/data.pkl", b"\x80\x02}(" + body + b"u."), ("archive/data/0", b"\0" * 64)):
            z.writestr(name, data, zipfile.ZIP_DEFLATED if name == squeezed else zipfile.ZIP_STORED)
    assert message in refused(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}(" + b")" + b"\x85" * 300_000 + b"Nu.",  # a nested key, whose hash would overflow the stack
        b"\x80\x02}(N\x85" + b"2\x86" * 40 + b"Nu.",  # a key of 2**40 parts
        b"\x80\x02}(N\x85q\x01" + b"".join(b"h%c(h%ct\x86q%c" % (i, i, i + 1) for i in range(1, 60)) + b"Nu.",
        b"\x80\x02" + b"]" * 1_000_000 + b".",
        b"\x80\x02" + b"(" * 1_000_000 + b".",
    ],
)
def test_pickles_that_would_hang_or_crash(pickled, tmp_path):
    factory.write_zip(tmp_path / "m.pth", pickled, {})
    refused(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.ffn.value.weight"), "blocks.1.ffn.value.weight is missing: expected (64, 192)"),
        (lambda w: w.pop("blocks.1.att.w1"), "blocks.1.att.w1 is missing"),
        (lambda w: w.pop("emb.weight"), "emb.weight is missing"),
        (
            lambda w: w.update({"blocks.1.att.key.weight": np.zeros((64, 32), np.float32)}),
            "blocks.1.att.key.weight has shape (64, 32), expected (64, 64) for n_embd=64",
        ),
        (lambda w: w.update({"emb.weight": np.zeros(7, np.float32)}), "emb.weight has shape (7,), expected rank 2"),
        (lambda w: w.update({"blocks.0.att.r_k": np.zeros((3, 5), np.float32)}), "expected 64 values for n_embd=64"),
        (lambda w: w.update({"blocks.1.extra": np.zeros(3, np.float32)}), "blocks.1.extra is not part of RWKV-7"),
        (lambda w: w["blocks.1.att.key.weight"].__setitem__((5, 7), np.nan), "blocks.1.att.key.weight holds a nan at [5, 7]"),
        (lambda w: w["ln_out.bias"].__setitem__(3, -np.inf), "ln_out.bias holds a -inf at [3]"),
    ],
)
def test_weights_that_are_not_a_model(change, message, tmp_path):
    w = {name: x.copy() for name, x in ODD.items()}
    change(w)
    assert message in refused(write(tmp_path, w))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("_strategy", "converted by ChatRWKV"),
        ("blocks.0.ffn.enn.weight", "RWKV-7b research model"),
        ("blocks.3.qkv.weight", "has attention layers besides RWKV's"),
        ("blocks.0.rosa_qkv.weight", "RWKV-8 ROSA research model"),
        ("blocks.0.ln3.weight", "has a third norm per layer"),
        ("blocks.0.att.time_state", "is an initial state, not a model"),
        ("blocks.0.att.key.lora_A", "is a LoRA, not a model"),
        ("model.layers.0.self_attn.q_proj.weight", "has attention layers: a hybrid"),
        ("model.layers.0.mlp.up_proj.weight", "is not an RWKV checkpoint"),
    ],
)
def test_other_files_are_refused_by_the_key_that_decided(key, message):
    with pytest.raises(CheckpointError) as e:
        detect([key, "emb.weight"])
    assert message in str(e.value)
    assert key in str(e.value)


def test_tensors_of_two_versions_are_refused():
    names = ["emb.weight", "blocks.0.att.r_k", "blocks.3.att.time_maa_x"]
    with pytest.raises(
        CheckpointError, match=r"more than one version of RWKV \('blocks.0.att.r_k' and 'blocks.3.att.time_maa_x'\)"
    ):
        detect(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("blocks.1.ffn.s_emb.weight"),
            "blocks.1.ffn.s_emb_x.weight needs emb.weight, blocks.0.ln0 and blocks.1",
        ),
        (
            lambda w: w.update({"blocks.0.ffn.s_emb_x.weight": np.zeros((5, 48), np.float32)}),
            "has shape (5, 48), expected (1024,",
        ),
        (lambda w: w.pop("blocks.1.ffn.s0"), "blocks.1.ffn.s0 is missing: expected (160,) for RWKV-7a"),
    ],
)
def test_a_deep_embed_that_is_not_whole_is_refused(change, message, tmp_path):
    w = factory.weights(**factory.DEEP_EMBED)
    change(w)
    assert message in refused(write(tmp_path, w))


def test_deep_embed_tables_are_merged_as_the_rwkv_package_does(tmp_path):
    w = factory.weights(**factory.DEEP_EMBED)
    table = open_checkpoint(write(tmp_path, w)).tensors["blocks.1.ffn.s_emb.weight"]
    x = w["emb.weight"].astype(np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    x = x * w["blocks.0.ln0.weight"] + w["blocks.0.ln0.bias"]
    expected = w["blocks.1.ffn.s_emb.weight"] + x @ w["blocks.1.ffn.s_emb_x.weight"].T
    np.testing.assert_allclose(table.read(), expected, atol=2e-6)
    np.testing.assert_array_equal(table.rows(7, 20), table.read()[7:20])


def header(entries, body=b"\0" * 64):
    import json

    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<Q", 10**15) + b"{" + b"\0" * 50, "has a header of 1000000000000000 bytes in a file of 59"),
        (header(b"{" + bytes(1 << 24)), "has a header of 16777217 bytes"),
        (header(b"{no json}"), "has a damaged header"),
        (header(b"{" + b'"a":{' * 5000), "has a damaged header"),
        (header({"a": 3}), "the header's entry for a is damaged"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}), "a of shape [4] does not fit the file"),
        (header({"a": {"dtype": "F32", "shape": [10**18] * 10**5, "data_offsets": [0, 4]}}), "does not fit the file"),
        (header({"a": {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}}), "does not fit the file"),
        (header({"a": {"dtype": "F32", "shape": [40], "data_offsets": [0, 160]}}), "does not fit the file"),
        (header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}), "does not fit the file"),
        (header({"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}}), "is stored as I64"),
        (header({"__metadata__": 3}), "has damaged metadata"),
        (header({"a": {"dtype": [], "shape": [2], "data_offsets": [0, 16]}}), "is stored as []"),
        (header(b'{"a":1,"a":2}'), "a name stands in it twice"),
        (header({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}), "a and b overlap"),
    ],
)
def test_safetensors_headers_that_lie(data, message, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert message in refused(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    quantize(write(folder, ODD), folder / "q.safetensors")
    return {
        "pth": (folder / "model.pth").read_bytes(),
        "safetensors": factory.write_safetensors(folder / "m.safetensors", ODD).read_bytes(),
        "quantized": (folder / "q.safetensors").read_bytes(),
    }


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["pth", "safetensors", "quantized"])
def test_damage_never_ends_in_a_traceback(kind, data, small, tmp_path):
    content = bytearray(small[kind])
    # header and pickle, or the zip's directory at the end: that is where damage changes more than a number
    places = st.integers(0, 12000) | st.integers(len(content) - 6000, len(content) - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path = Path(tmp_path, "damaged")
    path.write_bytes(content)
    try:
        for t in open_checkpoint(path).tensors.values():
            t.read()
    except RwkvEdgeError as e:
        assert "\n" not in " ".join(str(e).split())
