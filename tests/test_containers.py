"""The same weights in whatever container: the same tensors, the same bundle byte for byte; and what is refused."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import factory
import gguf
import numpy as np
import pytest
from factory import _int, _text, gguf_entry, gguf_tensor, gguf_value
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.convert import export, quantize
from rwkv_edge.errors import CheckpointError, RwkvEdgeError

# one of every version, by its shape in factory.SHAPES
SEVEN = ["odd", "plain", "one-head"]
BEFORE = [name for name in factory.SHAPES if name.startswith("v")]


def weights(name):
    return factory.weights(**factory.SHAPES[name])


def version(name):
    return "7" if name in SEVEN else name[1]


ODD = weights("odd")


def pth(w, folder, dtype):
    return factory.write_pth(folder / "m.pth", w, dtype)


def safetensors(w, folder, dtype):
    return factory.write_safetensors(folder / "m.safetensors", w, {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype])


def gguf_file(w, folder, dtype):
    v = "7" if "blocks.0.att.r_k" in w else "6"
    return factory.write_gguf(folder / "m.gguf", *factory.llama_cpp(w, v), dtype)


FOLDERS = {
    "transformers": lambda w, folder, dtype: factory.write_folder(folder / "m", factory.transformers(w), dtype),
    "transformers bin": lambda w, folder, dtype: factory.write_folder(folder / "m", factory.transformers(w), dtype, 3, "bin"),
    "official": lambda w, folder, dtype: factory.write_folder(folder / "m", w, dtype),
}
FOLDERS_7 = {
    "fla": lambda w, folder, dtype: factory.write_folder(folder / "m", factory.fla(w), dtype),
    "fla fused": lambda w, folder, dtype: factory.write_folder(folder / "m", factory.fla(w, fused=True), dtype, 2),
    "native": lambda w, folder, dtype: factory.write_folder(folder / "m", factory.native(w), dtype, 4),
    "native bin": lambda w, folder, dtype: factory.write_folder(folder / "m", factory.native(w), dtype, 1, "bin"),
}
CONTAINERS = {
    "safetensors": safetensors,
    "st": lambda w, folder, dtype: safetensors(factory.web_rwkv(w), folder, dtype),
    "gguf": gguf_file,
    "forward_module": lambda w, folder, dtype: pth({f"_forward_module.{n}": x for n, x in w.items()}, folder, dtype),
    "state_dict": lambda w, folder, dtype: factory.write_pth(
        folder / "m.pth", w, dtype, lambda d: b"}(" + _text("epoch") + _int(3) + _text("state_dict") + d + b"u"
    ),
    **FOLDERS,
    **FOLDERS_7,
}


def cases():
    for name in factory.SHAPES:
        for container in CONTAINERS:
            if container in FOLDERS_7 and name not in SEVEN:  # nor has anybody a form for 7a's tables
                continue
            if container == "gguf" and (version(name) in "45" or name == "v7a"):
                continue
            if container == "st" and name in ("v5.0", "v5.1"):  # web-rwkv knows 4, 5.2, 6 and 7
                continue
            for dtype in ("fp16",) if container == "st" else ("fp32",) if container == "gguf" else ("bf16", "fp16", "fp32"):
                if dtype == "bf16" or name in ("odd", "v6") or container in ("st", "gguf"):
                    yield pytest.param(name, container, dtype, id=f"{name}-{container}-{dtype}".replace(" ", "-"))


def same_bytes(a, b):
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("name", "container", "dtype"), list(cases()))
def test_the_same_weights_give_the_same_bundle(name, container, dtype, tmp_path):
    w = weights(name)
    (tmp_path / "pth").mkdir()
    reference = pth(w, tmp_path / "pth", dtype)
    other = CONTAINERS[container](w, tmp_path, dtype)
    a, b = open_checkpoint(reference), open_checkpoint(other)
    assert list(a.tensors) == list(b.tensors)
    for n, t in a.tensors.items():
        np.testing.assert_array_equal(t.read(), b.tensors[n].read(), err_msg=n)
        middle = t.shape[0] // 2
        parts = [b.tensors[n].rows(0, middle), b.tensors[n].rows(middle, t.shape[0])]
        np.testing.assert_array_equal(np.concatenate(parts), t.read(), err_msg=n)
    quant = {"quant": "int4"} if dtype == "bf16" else {"quant": "none"}
    same_bytes(export(reference, tmp_path / "a", **quant).path, export(other, tmp_path / "b", **quant).path)


# --- GGUF's types ---


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["odd", *(n for n in BEFORE if n == "v6")])
def test_a_gguf_file_rounds_matrices_only(name, dtype, tmp_path):
    w = weights(name)
    path = gguf_file(w, tmp_path, dtype)
    factors = "(_w1|_w2)" if version(name) == "6" else "[wavg][12]"
    for n, t in open_checkpoint(path).tensors.items():
        if "time_maa_w2." in n or t.data.dtype == "F32":
            continue
        expected = factory.as_stored(w[n], dtype)
        expected = expected.T if re.search(rf"{factors}$", n) else expected
        np.testing.assert_array_equal(t.read(), expected.reshape(t.shape), err_msg=n)
        assert len(t.shape) == 2


WIDE = dict(n_layer=1, n_head=4, head_size=64, n_ffn=256, n_vocab=8, ranks=(4, 4, 4, 4), layer0_v=False)


def readable():
    """Every type that the gguf package can read."""
    for kind, (n, nbytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except NotImplementedError:
            continue
        if kind.name not in ("F32", "F16", "BF16"):
            yield pytest.param(kind, n, nbytes, id=kind.name)


@pytest.mark.parametrize(("kind", "n", "nbytes"), list(readable()))
def test_every_type_of_the_gguf_package_is_read_in_row_blocks(kind, n, nbytes, tmp_path):
    tensors, about = factory.llama_cpp(factory.weights(**WIDE), "7")
    # bytes below 0x3c make no float16 of 1 or more, so every scale is finite
    data = (factory.uniform(kind.name, (8, 256 // n * nbytes), 0, 0x3C)).astype(np.uint8)
    path = factory.write_gguf(tmp_path / "m.gguf", tensors, about, packed={"token_embd.weight": (int(kind), data.tobytes())})
    t = open_checkpoint(path).tensors["emb.weight"]
    expected = gguf.dequantize(data, kind)
    assert t.data.dtype == kind.name
    assert t.nbytes == data.nbytes
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(t.read(), expected)
    np.testing.assert_array_equal(np.concatenate([t.rows(0, 3), t.rows(3, 8)]), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_a_quantized_gguf_file_is_exported(kind, tmp_path):
    tensors, about = factory.llama_cpp(factory.weights(**WIDE), "7")
    quant = gguf.GGMLQuantizationType[kind]
    matrices = {n: x for n, x in tensors.items() if x.ndim == 2 and x.shape[1] % 32 == 0 and ".time_mix_w" not in n}
    packed = {n: (int(quant), gguf.quantize(x, quant).tobytes()) for n, x in matrices.items()}
    source = factory.write_gguf(tmp_path / "m.gguf", tensors, about, packed=packed)
    written = export(source, tmp_path / "out")
    w = {n: t.read() for n, t in open_checkpoint(source).tensors.items()}
    exact = factory.weights(**WIDE)
    apart = np.abs(w["head.weight"] - exact["head.weight"]).max() / np.abs(exact["head.weight"]).max()
    assert 0 < apart < {"Q4_0": 0.13, "Q5_1": 0.05, "Q8_0": 0.01}[kind]
    again = quantize(source, tmp_path / "q.safetensors")
    assert written.model_id == again.model_id


def test_without_the_gguf_package_the_extra_is_named_when_it_is_needed(tmp_path):
    tensors, about = factory.llama_cpp(factory.weights(**WIDE), "7")
    plain = factory.write_gguf(tmp_path / "plain.gguf", tensors, about, "fp16")
    packed = {"token_embd.weight": (8, bytes(8 * 8 * 34))}
    quantized = factory.write_gguf(tmp_path / "q8.gguf", tensors, about, packed=packed)
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from rwkv_edge.checkpoints import open_checkpoint\n"
        "open_checkpoint(sys.argv[1])\n"
        "try: open_checkpoint(sys.argv[2])\n"
        "except ValueError: raise\n"
        "except Exception as e: print(e)"
    )
    run = subprocess.run([sys.executable, "-c", code, plain, quantized], capture_output=True, text=True, check=True)
    assert run.stdout == f"{quantized}: a quantized GGUF file needs the gguf package: pip install 'rwkv-edge[gguf]'\n"


# --- folders ---


def test_the_head_is_the_embedding_only_if_the_config_says_so(tmp_path):
    w = {n: x for n, x in ODD.items() if n != "head.weight"}
    tied = factory.write_folder(tmp_path / "tied", factory.fla(w), config={"tie_word_embeddings": True})
    t = open_checkpoint(tied).tensors
    np.testing.assert_array_equal(t["head.weight"].read(), t["emb.weight"].read())
    for config in ({"tie_word_embeddings": False}, {"a": 1}):
        untied = factory.write_folder(tmp_path / "untied", factory.fla(w), config=config)
        assert "head.weight is missing" in refused(untied)
    factory.write_folder(untied, factory.fla(w), config={"tie_word_embeddings": "yes"})
    assert "config.json has tie_word_embeddings 'yes': expected true or false" in refused(untied)
    (untied / "config.json").unlink()
    assert "head.weight is missing" in refused(untied)


def test_the_one_checkpoint_in_a_folder(tmp_path):
    one = pth(ODD, tmp_path, "fp32")
    (tmp_path / "README.md").write_text("hello")
    assert open_checkpoint(tmp_path).path == one
    factory.write_safetensors(tmp_path / "b.safetensors", ODD)
    assert refused(tmp_path) == f"{tmp_path} has several checkpoints: give one of 'b.safetensors', 'm.pth'"
    factory.write_folder(tmp_path, ODD)  # model.safetensors is what transformers would take
    assert open_checkpoint(tmp_path).path == tmp_path


def test_a_quantized_checkpoint_in_a_folder(tmp_path):
    written = quantize(pth(ODD, tmp_path, "fp32"), tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).known_id == written.model_id


def test_shards_may_be_links_as_in_the_hub_s_cache(tmp_path):
    folder = factory.write_folder(tmp_path / "m", factory.fla(ODD), n_shards=2)
    (tmp_path / "blobs").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(tmp_path / "blobs" / file.name[6:11])
        file.symlink_to(tmp_path / "blobs" / file.name[6:11])
    assert len(open_checkpoint(folder).tensors) > 40


WORLD_FILE = Path(__file__).parent.parent / "rwkv_edge" / "world" / "rwkv_vocab_v20230424.txt"


def test_a_folder_brings_its_tokenizer(tmp_path):
    w = factory.weights(**factory.WORLD)
    folder = factory.write_folder(tmp_path / "m", factory.fla(w))

    def tokenizer_of(out):
        manifest = json.loads((export(folder, tmp_path / out).path / "manifest.json").read_text())
        return manifest["tokenizer"], (tmp_path / out / "rwkv_vocab.txt").read_bytes()

    assert tokenizer_of("none")[1] == WORLD_FILE.read_bytes()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")  # another tokenizer's, which has no ids
    assert tokenizer_of("foreign")[1] == WORLD_FILE.read_bytes()
    # the same vocabulary, spelled otherwise: seen in the bundle
    lines = WORLD_FILE.read_text("utf-8").splitlines()
    (folder / "vocab.txt").write_text("\n".join(lines))
    about, data = tokenizer_of("own")
    assert about["kind"] == "world"
    assert data == "\n".join(lines).encode()


# --- what a .pth is wrapped in ---


def lightning(d):
    state = b"}(" + _text("exp_avg") + factory.tensor_pickle("0", (1,), "fp32") + b"u"
    states = b"](}(" + _text("state") + b"}" + b"(K\0" + state + b"u" + _text("param_groups") + b"]ue"
    schedulers = _text("lr_schedulers") + b"]"
    return b"}(" + _text("optimizer_states") + states + schedulers + _text("state_dict") + d + b"u"


def deepspeed(d):
    size = b"ctorch\nSize\n((J\4\0\0\0J\4\0\0\0ttR"
    names = b"c__builtin__\nset\n(]tR"
    shapes = _text("param_shapes") + b"](}(" + _text("emb.weight") + size + b"ue"
    return b"}(" + _text("module") + d + _text("optimizer") + b"N" + shapes + _text("sparse_tensor_module_names") + names + b"u"


def optimizer_beside(d):
    d = d.removesuffix(b"u")
    longs = factory.tensor_pickle("0", (1,), "fp32", storage=b"LongStorage")  # the step, which nobody reads
    return (
        d
        + _text("exp_avg")
        + factory.tensor_pickle("0", (1,), "fp32")
        + _text("optimizer")
        + b"}("
        + _text("s")
        + longs
        + b"uu"
    )


@pytest.mark.parametrize(
    "inside",
    [lightning, deepspeed, optimizer_beside]
    + [lambda d, key=key: b"}(" + _text(key) + d + b"u" for key in ("state_dict", "module", "model")]
    + [lambda d: b"}(" + _text("state_dict") + b"}(" + _text("model") + d + b"uu"],
)
def test_weights_are_taken_where_trainers_put_them(inside, tmp_path):
    w = {f"module.{n}": x for n, x in ODD.items()}
    path = factory.write_pth(tmp_path / "m.pth", w, "fp32", inside)
    plain = open_checkpoint(factory.write_pth(tmp_path / "p.pth", ODD, "fp32")).tensors
    for n, t in open_checkpoint(path).tensors.items():
        np.testing.assert_array_equal(t.read(), plain[n].read(), err_msg=n)


# --- what is refused: one line that names the file and what to do ---

ADVICE = re.compile(  # what to do, or what was expected
    "[Dd]ownload|give |[Ss]ave it|[Cc]onvert|expected|is missing|malicious|update|[Uu]se |is damaged|regular file|[Mm]erge"
    "|has been changed|is not an RWKV checkpoint|more than one version"
)


def refused(path):
    with pytest.raises(CheckpointError) as e:
        for t in open_checkpoint(path).tensors.values():
            t.read()
    message = str(e.value)
    assert message.isprintable()
    assert str(path) in message
    assert ADVICE.search(message), message
    return message


def wrapped(content):
    return lambda path: factory.write_zip(path, b"\x80\x02" + content + b".", {"0": bytes(64)})


R_K = factory.tensor_pickle("0", (4, 4), "fp32")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (wrapped(b"}(" + _text("_strategy") + _text("cpu fp32") + _text("emb.weight") + R_K + b"u"), "ChatRWKV (it has '_str"),
        (wrapped(b"}(" + _text("_version") + _text("0.7") + _text("emb.weight") + R_K + b"u"), "ChatRWKV (it has '_version')"),
        (wrapped(b"}(" + _text("optimizer_states") + b"]u"), "optimizer's states (it has 'optimizer_states')"),
        (wrapped(b"}(" + _text("exp_avg") + R_K + b"u"), "optimizer's states (it has 'exp_avg')"),
        (wrapped(b"}(" + _text("param_groups") + b"]" + _text("state") + b"}u"), "optimizer's states (it has 'param_groups')"),
        (wrapped(b"}q\0(" + _text("model") + b"h\0u"), "no tensors by name"),  # a dictionary in itself
        (wrapped(b"}(" + _text("state_dict") + b"carray\n_reconstruct\n)Ru"), "array._reconstruct, which no weights need"),
        (wrapped(b"}(" + (_text("model") + b"}(") * 20000 + b"u" * 20000 + b"u"), "no tensors by name"),
        (wrapped(b"}(" + _text("emb\nweight") + R_K + b"u"), "a tensor's name is 'emb\\nweight'"),
        (wrapped(b"}(" + _text("module.emb.weight") + R_K + _text("emb.weight") + R_K + b"u"), "emb.weight under two names"),
        (wrapped(b"}(" + _text("x") + b"ccollections\nOrderedDict\n(cos\nsystem\nttRu"), "os.system, which no weights need"),
        (wrapped(b"}(" + _text("x") + b"ctorch\nSize\nN\x85Ru"), "damaged"),
    ],
)  # fmt: skip
def test_hostile_pth(write, message, tmp_path):
    write(tmp_path / "m.pth")
    assert message in refused(tmp_path / "m.pth")


def st_file(change):
    def write(path):
        w = {n: x.copy() for n, x in factory.web_rwkv(ODD).items()}
        change(w)
        factory.write_safetensors(path, w, "F16")

    return write


def cut(share):
    def write(path):
        factory.write_safetensors(path, factory.web_rwkv(ODD), "F16")
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return write


def st_header(text):
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def one(name, **entry):
    return st_header(json.dumps({name: {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]} | entry}).encode())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (cut(0.01), "damaged or cut short"),
        (cut(0.9), "damaged or cut short"),
        (st_file(lambda w: w.pop("blocks.1.att.w2")), "blocks.1.att.w2 is missing"),
        (st_file(lambda w: w.update({"blocks.1.att.w1": w["blocks.1.att.w1"].T})), "blocks.1.att.w1 has shape"),
        (st_file(lambda w: w["blocks.1.att.w1"].__setitem__((2, 3), np.nan)), "blocks.1.att.w1 holds a nan at [2, 3]"),
        (st_file(lambda w: w.update({"blocks.0.att.time_mix_x": np.ones((1, 1, 64))})), "blocks.0.att.time_maa_x"),
        (st_file(lambda w: w.update({"blocks.0.att.key.lora.0": np.ones((4, 64))})), "LoRA, as web-rwkv wants it"),
        (one("emb.weight", dtype="I16"), "is stored as I16"),
        (one("emb.weight", shape=[1 << 60, 1 << 60]), "does not fit the file"),
        (one("emb\r\nweight"), "a name is 'emb\\r\\nweight'"),
        (st_header(b'{"a":' * 3000 + b"1" + b"}" * 3000), "damaged header"),
        (st_header(b"{}"), "is not an RWKV checkpoint"),
    ],
)
def test_hostile_st(write, message, tmp_path):
    write(tmp_path / "m.st")
    assert message in refused(tmp_path / "m.st")


def index(change):
    """Change the index of a sharded folder."""

    def attack(folder):
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        new = change(content["weight_map"])
        file.write_text(new if isinstance(new, str) else json.dumps(content))

    return attack


FIRST, SECOND = (f"model-{i:05}-of-00002.safetensors" for i in (1, 2))


def link(name, target):
    def attack(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name) if target is None else (folder / name).symlink_to(target)

    return attack


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (index(lambda m: m.update({"lm_head.weight": "../../x.bin"})), "names '../../x.bin': expected files beside"),
        (index(lambda m: m.update({"lm_head.weight": "/etc/passwd"})), "names '/etc/passwd': expected files beside"),
        (index(lambda m: m.update({"lm_head.weight": ".."})), "names '..': expected files beside"),
        (index(lambda m: m.update({"lm_head.weight": "a\nb"})), "names 'a\\nb'"),
        (index(lambda m: m.update({"lm_head.weight": 3})), "has no weight_map"),
        (index(lambda m: m.clear()), "has no weight_map"),
        (index(lambda m: '{"weight_map": {"a": "x", "a": "y"}}'), "a name stands in it twice"),
        (index(lambda m: '{"a":' * 100_000), "is damaged"),
        (index(lambda m: "[1]"), "expected an object"),
        (index(lambda m: " " * (1 << 24) + "{}"), "expected at most 16777216"),
        (index(lambda m: m.update(dict.fromkeys(m, FIRST))), "which the index says is there"),
        (index(lambda m: m.update({"extra": FIRST})), "has no extra, which the index says is there"),
        (lambda f: (f / SECOND).unlink(), f"names {SECOND}, which is not in"),
        (lambda f: (f / SECOND).write_bytes((f / FIRST).read_bytes()), f"is in {FIRST} too"),
        (lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-9]), "does not fit the file"),
        (lambda f: (f / SECOND).write_bytes(b"hello"), "is neither a torch checkpoint"),
        (link(FIRST, "/dev/zero"), "is no regular file"),
        (link(FIRST, None), "is no regular file"),
        (link(FIRST, FIRST), "is no regular file"),
        (link("model.safetensors.index.json", "/dev/zero"), "is no regular file"),
    ],
)  # fmt: skip
def test_hostile_folders(attack, message, tmp_path):
    folder = factory.write_folder(tmp_path / "m", factory.fla(ODD), n_shards=2)
    attack(folder)
    assert message in refused(folder)


def test_a_folder_whose_config_is_a_device(tmp_path):
    folder = factory.write_folder(tmp_path / "m", factory.fla({n: x for n, x in ODD.items() if n != "head.weight"}))
    link("config.json", "/dev/zero")(folder)
    assert "config.json is no regular file" in refused(folder)
    link("config.json", "config.json")(folder)
    assert "config.json is no regular file" in refused(folder)


def gguf_head(entries=b"", n=0, tensors=b"", n_tensors=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n) + entries + tensors + bytes(256)


ARCH = gguf_entry("general.architecture", gguf_value("rwkv7"))
HEAD = gguf_entry("rwkv7.wkv.head_size", gguf_value(16))


def tensor(name, shape, kind=0, offset=0):
    return gguf_head(ARCH + HEAD, 2, gguf_tensor(name, shape, kind, offset), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf_head()[:20], "is damaged or cut short"),
        (gguf_head(version=1), "GGUF version 1: this release reads 2 and 3"),
        (gguf_head(version=3 << 24), "GGUF version 50331648"),  # big-endian
        (gguf_head(n=1 << 60), "1152921504606846976 entries of metadata"),
        (gguf_head(n_tensors=1 << 60), "1152921504606846976 tensors"),
        (gguf_head(struct.pack("<Q", 1 << 50), 1), "1125899906842624 bytes expected"),
        (gguf_head(gguf_entry("a", struct.pack("<IIQ", 9, 8, 1 << 55)), 1), "a list of 36028797018963968 values"),
        (gguf_head(gguf_entry("a", struct.pack("<IIQ", 9, 4, 1 << 62)), 1), "a list of 4611686018427387904 values"),
        (gguf_head(gguf_entry("a", struct.pack("<IIQ", 9, 9, 3) * 9), 1), "a list of 3 values of type 9"),
        (gguf_head(gguf_entry("a", struct.pack("<I", 77)), 1), "metadata of type 77"),
        (gguf_head(ARCH + ARCH, 2), "general.architecture stands in it twice"),
        (gguf_head(gguf_entry("a\nb", gguf_value(1)), 1), "a name is 'a\\nb'"),
        (gguf_head(gguf_entry("a", struct.pack("<IQ", 8, 2) + b"\xff\xff"), 1), "is damaged or cut short"),
        (gguf_head(), "general.architecture is None, expected rwkv6 or rwkv7"),
        (gguf_head(gguf_entry("general.architecture", gguf_value("llama")), 1), "general.architecture is 'llama'"),
        (gguf_head(gguf_entry("general.architecture", gguf_value("arwkv7")), 1), "general.architecture is 'arwkv7'"),
        (gguf_head(gguf_entry("general.architecture", gguf_value("rwkv6qwen2")), 1), "hybrids such as arwkv7 and rwkv6qwen2"),
        (gguf_head(gguf_entry("general.architecture", gguf_value([b"rwkv7"])), 1), "general.architecture is a list of 1 texts"),
        (gguf_head(ARCH + gguf_entry("split.count", gguf_value(3)), 2), "split.count is 3: it is one of several parts"),
        (gguf_head(ARCH + gguf_entry("general.alignment", gguf_value(3)), 2), "general.alignment is 3"),
        (gguf_head(ARCH + gguf_entry("general.alignment", gguf_value(0)), 2), "general.alignment is 0"),
        (gguf_head(ARCH, 1), "rwkv7.wkv.head_size is None"),
        (gguf_head(ARCH + gguf_entry("rwkv7.wkv.head_size", gguf_value(0)), 2), "rwkv7.wkv.head_size is 0"),
        (gguf_head(ARCH + HEAD, 2), "is not an RWKV checkpoint"),
        (tensor("a", (1 << 62, 4)), "a tensor has shape"),
        (tensor("a", (0, 4)), "a tensor has shape (0, 4)"),
        (tensor("a", ()), "a tensor has 0 axes"),
        (tensor("a", (1,) * 5), "a tensor has 5 axes"),
        (tensor("a", (4, 100)), "a of shape (4, 100) does not fit the file"),
        (tensor("a", (4,), offset=1 << 62), "a of shape (4,) does not fit the file"),
        (tensor("a", (4,), offset=4), "a of shape (4,) does not fit the file"),
        (tensor("a", (4,), kind=99), "a tensor has type 99, which this gguf package does not know: update it"),
        (tensor("a", (4,), kind=26), "a tensor is stored as I32"),
        (tensor("a", (2, 33), kind=8), "is stored as Q8_0: expected a matrix of whole blocks"),
        (tensor("a", (32,), kind=8), "is stored as Q8_0: expected a matrix of whole blocks"),
        (gguf_head(ARCH + HEAD, 2, gguf_tensor("a", (4,), 0, 0) * 2, 2), "a stands in it twice"),
        (gguf_head(ARCH + HEAD, 2, gguf_tensor("a", (4,), 0, 0) + gguf_tensor("b", (4,), 0, 0), 2), "a and b overlap"),
    ],
)
def test_hostile_gguf(data, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    assert message in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("output.weight"), "head.weight is missing"),
        (lambda t: t.update({"blk.0.time_mix_lerp_fused.weight": np.ones((5, 1, 1, 64))}), "expected 6 of each"),
        (lambda t: t.update({"blk.9.time_mix_key.weight": np.ones((64, 64))}), "is missing"),
        (lambda t: t.update({"surprise": np.ones(3)}), "surprise is not part of RWKV-7"),
        (lambda t: t.update({"blk.1.ffn.x_k": t["blk.1.channel_mix_lerp_k.weight"]}), "under two names"),
        (lambda t: t["blk.1.time_mix_key.weight"].__setitem__((5, 7), np.inf), "holds a inf at [5, 7]"),
    ],
)
def test_gguf_files_that_are_no_model(change, message, tmp_path):
    tensors, about = factory.llama_cpp({n: x.copy() for n, x in ODD.items()}, "7")
    change(tensors)
    assert message in refused(factory.write_gguf(tmp_path / "m.gguf", tensors, about))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    tensors, about = factory.llama_cpp(factory.weights(**WIDE), "7")
    packed = {"token_embd.weight": (8, bytes(8 * 8 * 34))}
    return {
        "gguf": factory.write_gguf(folder / "m.gguf", tensors, about, packed=packed).read_bytes(),
        "st": factory.write_safetensors(folder / "m.st", factory.web_rwkv(ODD), "F16").read_bytes(),
        "index": (
            factory.write_folder(folder / "m", factory.fla(ODD), n_shards=2) / "model.safetensors.index.json"
        ).read_bytes(),
        "folder": folder / "m",
    }


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["gguf", "st", "index"])
def test_damage_never_ends_in_a_traceback(kind, data, small, tmp_path):
    content = bytearray(small[kind])
    for at in data.draw(st.lists(st.integers(0, min(3000, len(content) - 1)), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path = small["folder"] / "model.safetensors.index.json" if kind == "index" else tmp_path / "damaged"
    path.write_bytes(content)
    try:
        for t in open_checkpoint(small["folder"] if kind == "index" else path).tensors.values():
            t.read()
    except RwkvEdgeError as e:
        assert str(e).isprintable()
