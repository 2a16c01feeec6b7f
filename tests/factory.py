"""Small checkpoints of every version and shape, the same in every process and numpy, and torch's zip files without torch."""

import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# sizes: layers, heads, head size, ffn width, vocabulary, ranks of w a v g, and whether layer 0 has v0 v1 v2
SHAPES = {
    "odd": dict(n_layer=2, n_head=4, head_size=16, n_ffn=192, n_vocab=61, ranks=(5, 7, 3, 9), layer0_v=True),
    "plain": dict(n_layer=3, n_head=2, head_size=64, n_ffn=512, n_vocab=96, ranks=(32, 32, 16, 48), layer0_v=False),
    "one-head": dict(n_layer=2, n_head=1, head_size=64, n_ffn=256, n_vocab=40, ranks=(8, 6, 2, 12), layer0_v=True),
}
# the same of the versions before; ranks of time_maa and time_decay in 6
BEFORE_7 = {
    "v4": dict(version="4", n_layer=2, n_embd=48, n_ffn=160, n_vocab=61),
    "v5.0": dict(version="5.0", n_layer=2, n_head=3, head_size=16, n_ffn=160, n_vocab=61),
    "v5.1": dict(version="5.1", n_layer=2, n_head=3, head_size=16, n_ffn=144, n_vocab=61),
    "v5.2": dict(version="5.2", n_layer=2, n_head=3, head_size=16, n_ffn=144, n_vocab=61),
    "v6": dict(version="6", n_layer=2, n_head=3, head_size=16, n_ffn=144, n_vocab=61, ranks=(5, 7)),
}
DEEP_EMBED = dict(version="7a", n_layer=2, n_head=3, head_size=16, n_ffn=160, n_vocab=61, ranks=(5, 7, 3, 9), layer0_v=True)
WORLD = dict(n_layer=1, n_head=1, head_size=16, n_ffn=32, n_vocab=65536, ranks=(2, 2, 2, 2), layer0_v=False)


def uniform(name, shape, low=-1.0, high=1.0):
    """Numbers from integers alone (splitmix64), seeded by the tensor's name: no library can change them."""
    n = math.prod(shape)
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    unit = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return (unit * np.float32(high - low) + np.float32(low)).reshape(shape)


def weights(version="7", **sizes):
    """Official names and shapes; scaled so that activations are lively and the state matters."""
    w = {}

    def normal(name, shape, std, mean=0.0):
        w[name] = uniform(name, shape, mean - 1.73 * std, mean + 1.73 * std)

    if version in ("7", "7a"):
        weights7(w, normal, **sizes)
        if version == "7a":
            deep_embed(normal, w["blocks.0.ffn.key.weight"].shape, sizes["n_layer"], sizes["n_vocab"])
    else:
        weights_before_7(w, normal, version, **sizes)
    return w


def outer(normal, n_layer, C, n_vocab):
    """What every version has around and between time mix and channel mix."""
    normal("emb.weight", (n_vocab, C), 0.5)
    norms = ["blocks.0.ln0", "ln_out", *(f"blocks.{i}.ln{n}" for i in range(n_layer) for n in "12")]
    for name in norms:
        normal(f"{name}.weight", (C,), 0.1, 1.0)
        normal(f"{name}.bias", (C,), 0.05)
    normal("head.weight", (n_vocab, C), 2.0 / math.sqrt(C))


def weights7(w, normal, *, n_layer, n_head, head_size, n_ffn, n_vocab, ranks, layer0_v):
    C = n_head * head_size
    outer(normal, n_layer, C, n_vocab)
    for i in range(n_layer):
        b = f"blocks.{i}."
        a = f"{b}att."
        for c in "rwkvag":
            w[f"{a}x_{c}"] = uniform(f"{a}x_{c}", (1, 1, C), 0.0, 1.0)
        for c, r in zip("wavg", ranks, strict=True):
            if c == "v" and i == 0 and not layer0_v:
                continue
            normal(f"{a}{c}1", (C, r), 1 / math.sqrt(C))
            normal(f"{a}{c}2", (r, C), 1.5 / math.sqrt(r) if c == "g" else 1 / math.sqrt(r))
            if c != "g":
                normal(f"{a}{c}0", (1, 1, C), 1.0, -2.0 if c == "w" else 0.2)
        normal(f"{a}k_k", (1, 1, C), 0.1, 0.85)
        normal(f"{a}k_a", (1, 1, C), 0.1, 1.0)
        normal(f"{a}r_k", (n_head, head_size), 0.2)
        for m in ("receptance", "key", "value"):
            normal(f"{a}{m}.weight", (C, C), 1 / math.sqrt(C))
        normal(f"{a}output.weight", (C, C), 0.5 / math.sqrt(C))
        normal(f"{a}ln_x.weight", (C,), 0.1, 1.0)
        normal(f"{a}ln_x.bias", (C,), 0.05)
        w[f"{b}ffn.x_k"] = uniform(f"{b}ffn.x_k", (1, 1, C), 0.0, 1.0)
        normal(f"{b}ffn.key.weight", (n_ffn, C), 1 / math.sqrt(C))
        normal(f"{b}ffn.value.weight", (C, n_ffn), 0.4 / math.sqrt(n_ffn))


def deep_embed(normal, ffn_key, n_layer, n_vocab, rank=32):
    """RWKV-7a: a table per layer; the rwkv package knows rank 32 only."""
    n_ffn, C = ffn_key
    for i in range(n_layer):
        f = f"blocks.{i}.ffn."
        normal(f"{f}s_emb.weight", (n_vocab, rank * rank), 0.1)
        normal(f"{f}s_emb_x.weight", (rank * rank, C), 0.1 / math.sqrt(C))
        normal(f"{f}s1", (C, rank), 1 / math.sqrt(C))
        normal(f"{f}s2", (rank, n_ffn), 1 / math.sqrt(rank))
        normal(f"{f}s0", (n_ffn,), 0.2, 1.0)


def weights_before_7(w, normal, version, *, n_layer, n_ffn, n_vocab, n_embd=0, n_head=0, head_size=0, ranks=()):
    C = n_embd or n_head * head_size
    outer(normal, n_layer, C, n_vocab)
    mix = "time_maa" if version == "6" else "time_mix"
    per = {"4": (C,), "6": (1, 1, C), "5.2": (n_head, head_size)}.get(version, (n_head,))  # decay and bonus
    for i in range(n_layer):
        a, f = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        names = [f"{a}{mix}_{c}" for c in {"4": "rkv", "5.0": "rkv", "6": "xwkvrg"}.get(version, "rkvg")]
        for name in [*names, f"{f}{mix}_k", f"{f}{mix}_r"]:
            w[name] = uniform(name, (1, 1, C), 0.0, 1.0)
        if version == "6":
            normal(f"{a}time_maa_w1", (C, 5 * ranks[0]), 1 / math.sqrt(C))
            normal(f"{a}time_maa_w2", (5, ranks[0], C), 0.5 / math.sqrt(ranks[0]))
            normal(f"{a}time_decay_w1", (C, ranks[1]), 1 / math.sqrt(C))
            normal(f"{a}time_decay_w2", (ranks[1], C), 1 / math.sqrt(ranks[1]))
        w[f"{a}time_decay"] = uniform(f"{a}time_decay", per, -6.0, 1.5)
        first = "time_first" if version in ("4", "5.0") else "time_faaaa"
        normal(f"{a}{first}", (n_head, head_size) if version == "6" else per, 0.5, -0.5)
        for m in ("receptance", "key", "value", *(["gate"] if version in ("5.1", "5.2", "6") else [])):
            normal(f"{a}{m}.weight", (C, C), (2 if version == "4" else 1) / math.sqrt(C))
        normal(f"{a}output.weight", (C, C), 1.5 / math.sqrt(C))
        if version != "4":
            normal(f"{a}ln_x.weight", (C,), 0.1, 1.0)
            normal(f"{a}ln_x.bias", (C,), 0.05)
        normal(f"{f}key.weight", (n_ffn, C), 1 / math.sqrt(C))
        normal(f"{f}receptance.weight", (C, C), 1 / math.sqrt(C))
        normal(f"{f}value.weight", (C, n_ffn), 0.8 / math.sqrt(n_ffn))


SHAPES |= BEFORE_7 | {"v7a": DEEP_EMBED}


def tokens(n, n_vocab):
    """A text that visits the whole vocabulary."""
    return [int(t) for t in (uniform("tokens", (n,), 0, 1) * n_vocab).astype(int) % n_vocab]


def raw(x, dtype):
    if dtype == "fp32":
        return np.ascontiguousarray(x, "<f4").tobytes()
    if dtype == "fp16":
        return x.astype("<f2").tobytes()
    u = np.ascontiguousarray(x, "<f4").view(np.uint32)
    return ((u + (0x7FFF + ((u >> 16) & 1))) >> 16).astype("<u2").tobytes()  # bf16, to nearest even


def as_stored(x, dtype):
    """The numbers that a reader of this dtype gets."""
    if dtype == "bf16":
        return (np.frombuffer(raw(x, "bf16"), "<u2").astype(np.uint32) << 16).view(np.float32).reshape(x.shape)
    return np.frombuffer(raw(x, dtype), {"fp32": "<f4", "fp16": "<f2"}[dtype]).astype(np.float32).reshape(x.shape)


STORAGE = {"bf16": b"BFloat16Storage", "fp16": b"HalfStorage", "fp32": b"FloatStorage"}


def _text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def _int(n):
    return b"J" + struct.pack("<i", n)


def _tuple(items):
    return b"(" + b"".join(items) + b"t"


def tensor_pickle(key, shape, dtype, stride=None, offset=0, storage=None):
    """Opcodes that rebuild one tensor."""
    n = math.prod(shape)
    stride = stride or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    pid = _tuple([_text("storage"), b"ctorch\n" + (storage or STORAGE[dtype]) + b"\n", _text(key), _text("cpu"), _int(n)])
    hooks = b"ccollections\nOrderedDict\n)R"
    args = [pid + b"Q", _int(offset), _tuple(map(_int, shape)), _tuple(map(_int, stride)), b"\x89", hooks]
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(args) + b"R"


def write_zip(path, pickled, records):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", pickled)
        z.writestr("archive/byteorder", b"little")
        z.writestr("archive/version", b"3\n")
        for key, data in records.items():
            z.writestr(f"archive/data/{key}", data)


def write_pth(path: Path, w: Mapping[str, np.ndarray], dtype: str = "bf16", inside=lambda weights: weights) -> Path:
    """A torch zip file; `inside` puts the opcodes of the dictionary of weights into others."""
    entries = b"".join(_text(name) + tensor_pickle(str(i), x.shape, dtype) for i, (name, x) in enumerate(w.items()))
    content = inside(b"}(" + entries + b"u")
    write_zip(path, b"\x80\x02" + content + b".", {str(i): raw(x, dtype) for i, x in enumerate(w.values())})
    return path


def write_safetensors(path: Path, w: Mapping[str, np.ndarray], dtype: str = "BF16") -> Path:
    """A safetensors file, bfloat16 included."""
    kind = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}[dtype]
    header, body = {}, io.BytesIO()
    for name, x in w.items():
        start = body.tell()
        body.write(raw(x, kind))
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [start, body.tell()]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body.getvalue())
    return path


# --- the same weights as others store them ---


def _renamed(w, *table):
    def name(n):
        for pattern, replacement in table:
            n = re.sub(pattern, replacement, n)
        return n

    return {name(n): x for n, x in w.items()}


def web_rwkv(w):
    """As web-rwkv's convert_safetensors.py does, before it rounds to float16."""
    turned = r"\.(time_maa_w[12]|time_decay_w[12]|[wavg][12])$"
    w = {n: np.ascontiguousarray(np.swapaxes(x, -1, -2)) if re.search(turned, n) else x for n, x in w.items()}
    return _renamed(w, ("time_faaaa", "time_first"), ("time_maa", "time_mix"))


def transformers(w):
    """As transformers' RwkvForCausalLM has them, and the remote code for 5 and 6."""
    return _renamed(
        w,
        (r"^emb\.", "embeddings."),
        (r"\.ln0\.", ".pre_ln."),
        (r"\.att\.", ".attention."),
        (r"\.ffn\.", ".feed_forward."),
        (r"time_mix_k$", "time_mix_key"),
        (r"time_mix_v$", "time_mix_value"),
        (r"time_mix_r$", "time_mix_receptance"),
        (r"time_mix_g$", "time_mix_gate"),
        (r"^(?!head\.)", "rwkv."),
    )


def native(w):
    """As transformers' own Rwkv7ForCausalLM has them."""
    return _renamed(w, (r"^(?!head\.)", "rwkv7."))


def fla(w, fused=False):
    """As flash-linear-attention's RWKV7ForCausalLM has them; with fused, as its first versions had the lerps."""
    out = {}
    for n, x in w.items():
        if n.startswith("blocks.0.att.v") and n[-1] in "012":
            continue
        if x.shape[:2] == (1, 1) and ".att.x_" not in n:
            x = x.reshape(-1)
        out[n] = np.ascontiguousarray(x.T) if re.search(r"att\.[wavg][12]$", n) else x
    if fused:
        for prefix in [n.removesuffix("x_r") for n in out if n.endswith(".att.x_r")]:
            out[prefix + "x_x"] = np.stack([out.pop(prefix + f"x_{c}").reshape(-1) for c in "rwkvag"])
    return _renamed(
        out,
        (r"^emb\.", "model.embeddings."),
        (r"^ln_out\.", "model.norm."),
        (r"^head\.", "lm_head."),
        (r"^blocks\.", "model.layers."),
        (r"\.ln0\.", ".pre_norm."),
        (r"\.ln1\.", ".attn_norm."),
        (r"\.ln2\.", ".ffn_norm."),
        (r"\.att\.ln_x\.", ".attn.g_norm."),
        (r"\.att\.receptance", ".attn.r_proj"),
        (r"\.att\.key", ".attn.k_proj"),
        (r"\.att\.value", ".attn.v_proj"),
        (r"\.att\.output", ".attn.o_proj"),
        (r"\.att\.", ".attn."),
        (r"\.([wavg])1$", r".\1_lora.lora.0.weight"),
        (r"\.([wavg])2$", r".\1_lora.lora.2.weight"),
        (r"\.([wav])0$", r".\1_lora.lora.2.bias"),
    )


def write_folder(folder: Path, w, dtype="bf16", n_shards=1, kind="safetensors", config=None) -> Path:
    """A Hugging Face folder, sharded or not."""
    folder.mkdir(exist_ok=True)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names, places = list(w), {}
    for i in range(n_shards):
        file = f"{stem}.{kind}" if n_shards == 1 else f"{stem}-{i + 1:05}-of-{n_shards:05}.{kind}"
        held = {n: w[n] for n in names[i::n_shards]}
        if kind == "safetensors":
            write_safetensors(folder / file, held, {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype])
        else:
            write_pth(folder / file, held, dtype)
        places |= dict.fromkeys(held, file)
    if n_shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    # fla's and transformers' rule for the heads' norm is the official one at 64 channels only: this says the official eps
    config = config or {"model_type": "rwkv", "group_norm_epsilon": 64e-5}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_cpp(w, version, rescale_every=2):
    """Names and arrays as llama.cpp's converter makes them, and what it says about them."""
    head_size = next(x.shape[1] for n, x in w.items() if n.endswith((".r_k", ".time_faaaa")))
    about = {"general.architecture": f"rwkv{version}", f"rwkv{version}.wkv.head_size": head_size}
    out, fused = {}, {"6": ("time_maa_", "wkvrg"), "7": ("x_", "rwkvag")}[version]
    if version == "6":
        about["rwkv6.rescale_every_n_layers"] = rescale_every
    for n, x in w.items():
        if re.search(r"\.(time_maa_w[12]|time_decay_w[12]|[wavg][12])$", n):
            x = np.swapaxes(x, -1, -2)
        elif n.endswith("r_k") or x.shape[:2] == (1, 1):
            x = x.reshape(-1)
        elif version == "6" and n.endswith(("att.output.weight", "ffn.value.weight")):
            x = x / np.float32(2 ** (int(n.split(".")[1]) // rescale_every))
        out[n] = np.ascontiguousarray(x)
    for prefix in [n.removesuffix("ln_x.bias") for n in w if n.endswith(".ln_x.bias")]:
        lerps = [out.pop(prefix + fused[0] + c) for c in fused[1]]
        out[f"{prefix}lerp_fused"] = np.stack(lerps)[:, None, None]
        if version == "7" and ".0." in prefix:
            out |= {f"{prefix}v{i}": out[f"{prefix}a{i}"] for i in "012"}
    named = _renamed(
        out,
        (r"^emb\.", "token_embd."),
        (r"^head\.", "output."),
        (r"^ln_out\.", "output_norm."),
        (r"^blocks\.0\.ln0\.", "token_embd_norm."),
        (r"^blocks\.", "blk."),
        (r"\.ln1\.", ".attn_norm."),
        (r"\.ln2\.", ".attn_norm_2."),
        (r"\.att\.ln_x\.", ".time_mix_ln."),
        (r"\.ffn\.(x|time_maa)_", ".channel_mix_lerp_"),
        (r"\.ffn\.", ".channel_mix_"),
        (r"\.att\.time_maa_x", ".att.lerp_x"),
        (r"\.att\.(time_maa_|time_)?", ".time_mix_"),
        (r"faaaa$", "first"),
        (r"(?<!\.weight)(?<!\.bias)$", ".weight"),
    )
    return named, about


GGUF_PLAIN = {"fp32": 0, "fp16": 1, "bf16": 30}


def gguf_value(v):
    if isinstance(v, str):
        return struct.pack("<IQ", 8, len(v.encode())) + v.encode()
    if isinstance(v, list):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(struct.pack("<Q", len(x)) + x for x in v)
    return struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v)


def gguf_entry(key, value):
    return struct.pack("<Q", len(key)) + key.encode() + value


def gguf_tensor(name, shape, kind, offset):
    dims = struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return struct.pack("<Q", len(name.encode())) + name.encode() + dims + struct.pack("<IQ", kind, offset)


def write_gguf(path: Path, tensors, about, dtype="fp32", packed=None) -> Path:
    """A GGUF file: matrices in dtype, the rest in float32; packed is name -> (type, bytes) for what is quantized."""
    body, infos = io.BytesIO(), []
    for name, x in tensors.items():
        kind, data = (packed or {}).get(name) or ((GGUF_PLAIN[dtype], raw(x, dtype)) if x.ndim == 2 else (0, raw(x, "fp32")))
        body.write(bytes(-body.tell() % 32))
        infos.append(gguf_tensor(name, x.shape, kind, body.tell()))
        body.write(data)
    about = {"tokenizer.ggml.tokens": [b"<s>", b"\xff"], "rwkv.eps": 1e-5} | about
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(about))
    head += b"".join(gguf_entry(k, gguf_value(v)) for k, v in about.items()) + b"".join(infos)
    path.write_bytes(head + bytes(-len(head) % 32) + body.getvalue())
    return path
