"""Settings beside the weights: config.json and a GGUF's metadata change the numbers as the tools that wrote them say.

Expected values come from the float64 steps below, whose eps are parameters.
"""

import json
import math
import re

import factory
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import GRAPH, apart
from test_bundle import SCHEMA

from rwkv_edge import export, open_bundle
from rwkv_edge.bundle import MANIFEST, read_bundle
from rwkv_edge.check import check
from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.cli import cli
from rwkv_edge.convert import quantize
from rwkv_edge.errors import BundleError, CheckpointError, StateError

IDS = factory.tokens(24, 61)


# --- one step of every version, written from the papers; w has official names ---


def norm(x, w, name, eps):
    d = x - x.mean(-1, keepdims=True)
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def head_norm(y, w, a, eps):
    d = y - y.mean(-1, keepdims=True)
    return (d / np.sqrt((d * d).mean(-1, keepdims=True) + eps)).reshape(-1) * w[f"{a}ln_x.weight"] + w[f"{a}ln_x.bias"]


def att4(w, a, x, p, s, eps, first):
    mixed = {c: x * w[f"{a}time_mix_{c}"] + p * (1 - w[f"{a}time_mix_{c}"]) for c in "rkv"}
    r, k, v = (w[f"{a}{n}.weight"] @ mixed[n[0]].reshape(-1) for n in ("receptance", "key", "value"))
    num, den = s.get(a, (np.zeros_like(k), np.zeros_like(k)))
    own = np.exp(w[f"{a}time_first"] + k)
    y = (num + own * v) / (den + own)
    decay = np.exp(-np.exp(w[f"{a}time_decay"]))
    s[a] = (decay * num + np.exp(k) * v, decay * den + np.exp(k))
    return w[f"{a}output.weight"] @ (sigmoid(r) * y)


def att5(w, a, x, p, s, eps, first):
    mixed = {c: (x * w[f"{a}time_mix_{c}"] + p * (1 - w[f"{a}time_mix_{c}"])).reshape(-1) for c in "rkvg"}
    decay = np.exp(-np.exp(w[f"{a}time_decay"]))
    return att56(w, a, mixed, decay, s, eps)


def att6(w, a, x, p, s, eps, first):
    d = p - x
    t = np.tanh((x + d * w[f"{a}time_maa_x"].reshape(-1)) @ w[f"{a}time_maa_w1"]).reshape(5, 1, -1)
    m = (t @ w[f"{a}time_maa_w2"])[:, 0]
    mixed = {c: x + d * (w[f"{a}time_maa_{c}"].reshape(-1) + m[i]) for i, c in enumerate("wkvrg")}
    decay = w[f"{a}time_decay"].reshape(-1) + np.tanh(mixed["w"] @ w[f"{a}time_decay_w1"]) @ w[f"{a}time_decay_w2"]
    return att56(w, a, mixed, np.exp(-np.exp(decay)).reshape(w[f"{a}time_faaaa"].shape), s, eps)


def att56(w, a, mixed, decay, s, eps):
    u = w[f"{a}time_faaaa"]
    r, k, v = ((w[f"{a}{n}.weight"] @ mixed[n[0]]).reshape(u.shape) for n in ("receptance", "key", "value"))
    S = s.get(a, np.zeros((*u.shape, u.shape[1])))  # [head, key, value]
    kv = k[:, :, None] * v[:, None, :]
    y = np.einsum("hk,hkv->hv", r, S + u[:, :, None] * kv)
    s[a] = decay[:, :, None] * S + kv
    g = w[f"{a}gate.weight"] @ mixed["g"]
    return w[f"{a}output.weight"] @ (head_norm(y, w, a, eps) * g * sigmoid(g))


def att7(w, a, x, p, s, eps, first):
    z = {c: x + (p - x) * w[f"{a}x_{c}"].reshape(-1) for c in "rwkvag"}
    H, N = w[f"{a}r_k"].shape
    r, k, v = (w[f"{a}{n}.weight"] @ z[n[0]] for n in ("receptance", "key", "value"))
    decay = w[f"{a}w0"].reshape(-1) + np.tanh(z["w"] @ w[f"{a}w1"]) @ w[f"{a}w2"]
    decay = np.exp(-math.exp(-0.5) * sigmoid(decay)).reshape(H, N)
    rate = sigmoid(w[f"{a}a0"].reshape(-1) + z["a"] @ w[f"{a}a1"] @ w[f"{a}a2"]).reshape(H, N)
    g = sigmoid(z["g"] @ w[f"{a}g1"]) @ w[f"{a}g2"]
    if "v" in first:
        v = v + (first["v"] - v) * sigmoid(w[f"{a}v0"].reshape(-1) + z["v"] @ w[f"{a}v1"] @ w[f"{a}v2"])
    else:
        first["v"] = v
    kk = (k * w[f"{a}k_k"].reshape(-1)).reshape(H, N)
    kk = kk / np.maximum(np.linalg.norm(kk, axis=1, keepdims=True), 1e-12)
    r, k, v = r.reshape(H, N), k.reshape(H, N), v.reshape(H, N)
    k = k * (1 + (rate - 1) * w[f"{a}k_a"].reshape(H, N))
    S = s.get(a, np.zeros((H, N, N)))  # [head, value, key]
    erased = np.einsum("hvk,hk->hv", S, kk)
    S = s[a] = S * decay[:, None] - erased[:, :, None] * (kk * rate)[:, None] + v[:, :, None] * k[:, None]
    y = head_norm(np.einsum("hvk,hk->hv", S, r), w, a, eps)
    y = y + ((r * k * w[f"{a}r_k"]).sum(1, keepdims=True) * v).reshape(-1)
    return w[f"{a}output.weight"] @ (y * g)


def ffn(w, f, x, p, version):
    if version == "7":
        k = np.maximum(w[f"{f}key.weight"] @ (x + (p - x) * w[f"{f}x_k"].reshape(-1)), 0) ** 2
        return w[f"{f}value.weight"] @ k
    if version == "6":
        z = {c: x + (p - x) * w[f"{f}time_maa_{c}"].reshape(-1) for c in "kr"}
    else:
        z = {c: p + (x - p) * w[f"{f}time_mix_{c}"].reshape(-1) for c in "kr"}
    k = np.maximum(w[f"{f}key.weight"] @ z["k"], 0) ** 2
    return sigmoid(w[f"{f}receptance.weight"] @ z["r"]) * (w[f"{f}value.weight"] @ k)


def logits_of(w, version, eps, heads, out):
    """Logits of every token of IDS, in float64."""
    att = {"4": att4, "5": att5, "6": att6, "7": att7}[version]
    w = {n: x.astype(np.float64) for n, x in w.items()}
    n_layer, C = 1 + max(int(n.split(".")[1]) for n in w if n.startswith("blocks.")), w["emb.weight"].shape[1]
    s, before, logits = {}, {}, []
    for token in IDS:
        x, first = norm(w["emb.weight"][token], w, "blocks.0.ln0", eps), {}
        for i in range(n_layer):
            b = f"blocks.{i}."
            z = norm(x, w, f"{b}ln1", eps)
            x = x + att(w, f"{b}att.", z, before.get((i, 1), np.zeros(C)), s, heads, first)
            before[i, 1] = z
            z = norm(x, w, f"{b}ln2", eps)
            x = x + ffn(w, f"{b}ffn.", z, before.get((i, 2), np.zeros(C)), version)
            before[i, 2] = z
        logits.append(w["head.weight"] @ norm(x, w, "ln_out", out))
    return np.array(logits)


# --- models whose eps matter ---


def quiet(w):
    """The same, with little in what norms take."""
    parts = {"emb.weight": 0.02, "ln0.weight": 0.02, "ln0.bias": 0.02, "att.value.weight": 0.05}
    parts |= {"att.output.weight": 0.05, "ffn.value.weight": 0.05}
    scale = {n: next((f for end, f in parts.items() if n.endswith(end)), 1.0) for n in w}
    return {n: (x * np.float32(scale[n])).astype(np.float32) for n, x in w.items()}


def seven(N, H=2):
    return quiet(factory.weights(n_layer=2, n_head=H, head_size=N, n_ffn=96, n_vocab=61, ranks=(8, 8, 8, 8), layer0_v=False))


def before(name):
    return quiet(factory.weights(**factory.SHAPES[name]))


def sizes(w):
    layers = {n.split(".")[1] for n in w if n.startswith("blocks.")}
    V, C = w["emb.weight"].shape
    return {"hidden_size": C, "vocab_size": V, "num_hidden_layers": len(layers)}


def fla(w, **config):
    return {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "hidden_act": "sqrelu", **sizes(w), **config}


def folder(layout, w, config):
    named = {"fla": factory.fla, "native": factory.native, "transformers": factory.transformers, "official": dict}[layout](w)
    return lambda path: factory.write_folder(path, named, "fp32", config=config)


def gguf(w, version, about):
    def write(path):
        tensors, known = factory.llama_cpp(w, version)
        return factory.write_gguf(path.with_suffix(".gguf"), tensors, known | about)

    return write


W = {N: seven(N) for N in (16, 32, 64, 128)}
V4, V52, V6 = before("v4"), before("v5.2"), before("v6")
# what is written, its weights and version, and eps of layer norms, of heads, of ln_out
CASES = {
    "fla, heads of 128": (folder("fla", W[128], fla(W[128], norm_eps=1e-5, head_dim=128)), W[128], "7", 1e-5, 128e-5, 1e-5),
    "fla, heads of 32, 1e-6": (folder("fla", W[32], fla(W[32], norm_eps=1e-6)), W[32], "7", 1e-6, 32e-6, 1e-6),
    "fla, 1e-3": (folder("fla", W[64], fla(W[64], norm_eps=1e-3)), W[64], "7", 1e-3, 64e-3, 1e-3),
    "fla, nothing said": (folder("fla", W[16], fla(W[16])), W[16], "7", 1e-5, 16e-5, 1e-5),
    "native, 1e-4": (folder("native", W[32], fla(W[32], norm_eps=1e-4)), W[32], "7", 1e-4, 32e-4, 1e-4),
    "native without a prefix": (folder("official", W[32], fla(W[32], norm_eps=1e-6)), W[32], "7", 1e-6, 32e-6, 1e-6),
    # transformers' RwkvModel gives ln_out no eps: it has torch's
    "4, 1e-3": (folder("transformers", V4, {"model_type": "rwkv", "layer_norm_epsilon": 1e-3}), V4, "4", 1e-3, 0, 1e-5),
    # the remote code: GroupNorm(eps=(1e-5) * (config.head_size_divisor**2))
    "5.2, divisor 2": (
        folder("transformers", V52, {"model_type": "rwkv5", "head_size_divisor": 2}), V52, "5", 1e-5, 4e-5, 1e-5,
    ),
    "6, divisor 16, 1e-4": (
        folder("transformers", V6, {"model_type": "rwkv6", "head_size_divisor": 16, "layer_norm_epsilon": 1e-4}),
        V6, "6", 1e-4, 256e-5, 1e-5,
    ),
    # llama.cpp: ggml_norm(ctx0, cur, 64e-5f), and f_norm_eps for all others
    "GGUF 7, 1e-6": (
        gguf(W[32], "7", {"rwkv7.attention.layer_norm_epsilon": 1e-6}), W[32], "7", 1e-6, 64e-5, 1e-6,
    ),
    "GGUF 6, 1e-3": (gguf(V6, "6", {"rwkv6.attention.layer_norm_epsilon": 1e-3}), V6, "6", 1e-3, 64e-5, 1e-3),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A checkpoint, and its logits by its own settings and by the usual ones."""
    write, w, version, eps, heads, out = CASES[request.param]
    expected, usual = logits_of(w, version, eps, heads, out), logits_of(w, version, 1e-5, 64e-5, 1e-5)
    assert apart(usual, expected) > 0.02  # the settings matter
    return write(tmp_path / "model"), w, version, (eps, heads, out), expected, usual


@pytest.mark.parametrize("wkv", ["attention", "plain", "step"])
def test_onnx_computes_with_the_settings(case, wkv, tmp_path):
    source, *_, expected, _ = case
    bundle = export(source, tmp_path / "out", quant="none", wkv=wkv).path
    assert apart(open_bundle(bundle).feed(IDS, every=True)[0], expected) <= 4 * GRAPH


def test_both_onnx_graphs_of_a_quantized_bundle_compute_with_the_settings(case, tmp_path):
    source, w, version, eps, *_ = case
    bundle = export(source, tmp_path / "out", quant="int8").path
    w = dict(w)
    for name, t in read_bundle(bundle).tensors.items():  # what int8 made of the matrices
        if name in w and t.recipe.block:
            x = t.read().dequantize()
            w[name] = x if x.shape == w[name].shape else x.T
        elif ".time_maa_w2." in name:
            w[name[:-2]] = w[name[:-2]].copy()
            w[name[:-2]]["wkvrg".index(name[-1])] = (t.read() if not t.recipe.block else t.read().dequantize()).T
        elif t.recipe.bits == 16:
            w[name] = t.read() if t.shape == w[name].shape else t.read().T
    expected, usual = logits_of(w, version, *eps), logits_of(w, version, 1e-5, 64e-5, 1e-5)
    exact, run = (open_bundle(bundle, exact=role == "exact").feed(IDS, every=True)[0] for role in ("exact", "run"))
    assert apart(exact, expected) <= 0.05 * apart(usual, expected)
    assert np.square(run - expected).mean() < np.square(run - usual).mean() or apart(usual, expected) < 0.2
    assert check(bundle, n_tokens=20).ok


@pytest.mark.parametrize("profile", ["ane", "gpu"])
def test_coreml_computes_with_the_settings(case, profile, tmp_path):
    source, *_, expected, usual = case
    bundle = export(source, tmp_path / "out", quant="fp16", target="coreml", profile=profile).path
    found = open_bundle(bundle, interpret="exact").feed(IDS, every=True)[0]
    # float16 holds 1e-6 at a quarter of the stream within 5 %
    assert np.abs(found - expected).mean() <= 0.15 * np.abs(usual - expected).mean() + 2e-3 * expected.std()
    report = check(bundle, n_tokens=16)
    assert report.ok
    assert report.packages == ()


def test_the_manifest_states_the_settings_and_inspect_the_unusual_ones(case, tmp_path):
    source, _, version, (eps, heads, out), *_ = case
    bundle = export(source, tmp_path / "out", quant="none").path
    manifest = json.loads((bundle / MANIFEST).read_text())
    jsonschema.validate(manifest, SCHEMA)
    said = {"norm_eps": eps, "head_norm_eps": heads if version != "4" else 64e-5, "out_norm_eps": out}
    assert {name: manifest["spec"][name] for name in said} == said
    usual = {"norm_eps": 1e-5, "head_norm_eps": 64e-5, "out_norm_eps": 1e-5}
    line = "unusual settings  " + "  ".join(f"{n} {v:g}" for n, v in said.items() if v != usual[n])
    for path in (source, bundle):
        shown = CliRunner().invoke(cli, ["inspect", str(path)])
        assert shown.exit_code == 0, shown.output
        assert line in shown.output.splitlines()


def test_mlx_lm_has_the_official_eps_of_heads_beside_fla_s_settings(tmp_path):
    """mlx-lm: LayerNormPerHead(self.head_dim, self.num_heads, eps=64e-5); it stores what goes by heads as (H, N)."""
    named = factory.fla(W[128])
    for name, x in named.items():
        if name.endswith((".k_k", ".k_a", ".g_norm.weight", ".g_norm.bias")):
            named[name] = x.reshape(-1, 128)
    source = factory.write_folder(tmp_path / "m", named, "fp32", config=fla(W[128], norm_eps=1e-6, head_dim=128))
    found = open_bundle(export(source, tmp_path / "b", quant="none").path).feed(IDS, every=True)[0]
    assert apart(found, logits_of(W[128], "7", 1e-6, 64e-5, 1e-6)) <= 4 * GRAPH


# --- settings are part of what a model is ---


def test_models_that_differ_in_eps_share_no_states(tmp_path):
    ids, models = [], []
    for i, config in enumerate([{"norm_eps": 1e-5}, {"norm_eps": 1e-6}, {"norm_eps": 1e-5, "group_norm_epsilon": 1e-3}]):
        source = folder("fla", W[64], fla(W[64], **config))(tmp_path / f"m{i}")
        models.append(open_bundle(export(source, tmp_path / f"b{i}", quant="none").path))
        ids.append(models[-1].bundle.model_id)
    assert len(set(ids)) == 3
    _, state = models[0].feed(IDS)
    state.save(tmp_path / "s")
    assert models[0].load_state(tmp_path / "s").n_tokens == len(IDS)
    for other in models[1:]:
        with pytest.raises(StateError):
            other.load_state(tmp_path / "s")
    # the usual settings are the model that a .pth is, as they always were
    plain = export(factory.write_pth(tmp_path / "m.pth", W[64], "fp32"), tmp_path / "plain", quant="none")
    assert plain.model_id == ids[0]


def test_a_quantized_checkpoint_and_a_lora_keep_the_settings(tmp_path):
    source = folder("fla", W[32], fla(W[32], norm_eps=1e-6))(tmp_path / "m")
    direct = export(source, tmp_path / "direct", quant="int4")
    packed = quantize(source, tmp_path / "q.safetensors", quant="int4")
    twice = export(packed.path, tmp_path / "twice")
    assert direct.model_id == packed.model_id == twice.model_id
    assert read_bundle(twice.path).manifest["spec"].get("head_norm_eps") == 32e-6
    assert (direct.path / "model.onnx").read_bytes() == (twice.path / "model.onnx").read_bytes()

    a, b = factory.uniform("A", (4, 64)), factory.uniform("B", (64, 4), -0.01, 0.01)
    key = "blocks.1.att.key"
    lora = factory.write_pth(tmp_path / "lora.pth", {f"{key}.lora_A": a, f"{key}.lora_B": b}, "fp32")
    merged = export(source, tmp_path / "merged", quant="none", lora=f"{lora}:4").path
    w = W[32] | {f"{key}.weight": W[32][f"{key}.weight"] + b.astype(np.float64) @ a}
    found = open_bundle(merged).feed(IDS, every=True)[0]
    assert apart(found, logits_of(w, "7", 1e-6, 32e-6, 1e-6)) <= 4 * GRAPH


@pytest.mark.parametrize("value", [None, 0, -1e-5, 11, "1e-5", True, math.nan])
@pytest.mark.parametrize("key", ["norm_eps", "head_norm_eps", "out_norm_eps"])
def test_a_manifest_states_an_eps_that_can_be(key, value, tmp_path):
    bundle = export(factory.write_pth(tmp_path / "m.pth", W[16], "fp32"), tmp_path / "b", quant="none").path
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert key in manifest["spec"]
    manifest["spec"] |= {key: value}
    if value is None:
        del manifest["spec"][key]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=key):
        read_bundle(bundle)
    if value is not math.nan:  # the schema's maker has no word on it
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest, SCHEMA)


def test_the_tables_of_7a_contain_the_norm_of_the_embedding(tmp_path):
    w = quiet(factory.weights(**factory.DEEP_EMBED))
    source = folder("official", w, fla(w, norm_eps=1e-3))(tmp_path / "m")
    exact = {n: x.astype(np.float64) for n, x in w.items()}
    normed = norm(exact["emb.weight"], exact, "blocks.0.ln0", 1e-3)
    for i in range(2):
        f = f"blocks.{i}.ffn."
        expected = exact[f"{f}s_emb.weight"] + normed @ exact[f"{f}s_emb_x.weight"].T
        assert apart(open_checkpoint(source).tensors[f"{f}s_emb.weight"].read(), expected) < 1e-5


# --- what is refused, and what changes nothing ---


def refused(path):
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(path)
    message = str(e.value)
    assert message.isprintable()
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    "said",
    [
        {"hidden_act": "relu"}, {"hidden_act": "gelu"}, {"hidden_act": "silu"}, {"hidden_act": None}, {"norm_first": False},
        {"attn": {"layers": [1], "num_heads": 2}}, {"use_deep_embed": True}, {"embedding_layer_norm_fused": True},
        {"logit_scale": 0.5}, {"residual_scale": 2}, {"final_logit_softcapping": 30.0}, {"wkv_has_gate": False},
        {"norm_eps": "1e-5"}, {"norm_eps": 0}, {"norm_eps": -1e-5}, {"norm_eps": None}, {"norm_eps": True},
        {"norm_eps": [1e-5]},
        {"norm_eps": math.nan}, {"norm_eps": math.inf}, {"norm_eps": 1e400}, {"norm_eps": 10**400}, {"norm_eps": 1e-30},
        {"norm_eps": 1e-6, "layer_norm_epsilon": 1e-5}, {"group_norm_epsilon": "x"},
        {"norm_bias": "false"}, {"norm_bias": 0}, {"tie_word_embeddings": 1},
        {"hidden_size": 2048}, {"num_hidden_layers": 3}, {"vocab_size": 65536}, {"head_dim": 64}, {"hidden_size": "32"},
        {"architectures": ["Rwkv6ForCausalLM"]}, {"model_type": "rwkv5"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_the_step_cannot_do_are_refused_by_name(said, tmp_path):
    message = refused(folder("fla", W[16], fla(W[16]) | said)(tmp_path / "m"))
    key, value = next(iter(said.items()))
    assert "config.json" in message
    assert (value[0] if key == "architectures" else value if key == "model_type" else key) in message


@pytest.mark.parametrize("divisor", [0, -8, "8", None, True, math.nan])
def test_a_divisor_is_a_number(divisor, tmp_path):
    config = {"model_type": "rwkv6", "head_size_divisor": divisor}
    assert "head_size_divisor" in refused(folder("transformers", V6, config)(tmp_path / "m"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.layer_norm_epsilon", 0.0),
        ("attention.layer_norm_epsilon", "1e-5"),
        ("attention.layer_norm_epsilon", math.nan),
        ("attention.group_norm_epsilon", 1e-5),
        ("token_shift_count", 1),
        ("logit_scale", 0.5),
        ("embedding_scale", 2.0),
    ],
)
def test_metadata_that_the_step_cannot_do_is_refused_by_name(key, value, tmp_path):
    source = gguf(W[16], "7", {f"rwkv7.{key}": value})(tmp_path / "m")
    assert f"rwkv7.{key}" in refused(source)


def test_metadata_of_the_usual_values_changes_nothing(tmp_path):
    usual = {
        "rwkv7.attention.layer_norm_epsilon": 1e-5, "rwkv7.attention.group_norm_epsilon": 64e-5, "rwkv7.token_shift_count": 2,
        "rwkv7.attention.layer_norm_rms_epsilon": 1e-6, "rwkv7.context_length": 7,
    }  # fmt: skip
    said = export(gguf(W[16], "7", usual)(tmp_path / "a"), tmp_path / "said", quant="none")
    pth = export(factory.write_pth(tmp_path / "m.pth", W[16], "fp32"), tmp_path / "pth", quant="none")
    assert said.model_id == pth.model_id
    assert (said.path / MANIFEST).read_bytes() == (pth.path / MANIFEST).read_bytes()
    other = export(gguf(W[16], "7", usual | {"rwkv7.attention.layer_norm_epsilon": 2e-5})(tmp_path / "b"), tmp_path / "o")
    assert other.model_id != pth.model_id


def test_settings_that_change_nothing_change_nothing(tmp_path):
    nothing = {
        "rescale_every": 3, "fuse_norm": False, "attn_mode": "fused_recurrent", "use_cache": False, "initializer_range": 9,
        "context_length": 17, "max_position_embeddings": 5, "torch_dtype": "float16", "fuse_cross_entropy": False,
        "value_dim": [32, 32], "num_heads": None, "decay_low_rank_dim": 99, "a_key_of_tomorrow": {"x": [1]},
    }  # fmt: skip
    bundles = []
    for i, more in enumerate([{}, nothing]):
        source = folder("fla", W[32], fla(W[32], norm_eps=1e-6, **more))(tmp_path / f"m{i}")
        bundles.append(export(source, tmp_path / f"b{i}", quant="none").path)
    for file in bundles[0].iterdir():
        assert file.read_bytes() == (bundles[1] / file.name).read_bytes()
    assert json.loads((bundles[1] / MANIFEST).read_text())["spec"].get("norm_eps") == 1e-6


# --- norms without biases ---


def without_biases(w):
    return {n: x for n, x in w.items() if not re.search(r"(\.ln[012]|ln_out)\.bias$", n)}


@pytest.mark.parametrize("layout", ["fla", "native"])
def test_norm_bias_false_is_biases_of_zeros(layout, tmp_path):
    bare = without_biases(W[64])
    zeros = {n: np.zeros_like(x) if n not in bare else x for n, x in W[64].items()}
    source = folder(layout, bare, fla(bare, norm_eps=1e-5, norm_bias=False))(tmp_path / "m")
    written = export(source, tmp_path / "bare", quant="none")
    explicit = export(factory.write_pth(tmp_path / "m.pth", zeros, "fp32"), tmp_path / "explicit", quant="none")
    assert any("norm_bias false" in note for note in written.notes)
    for file in explicit.path.iterdir():
        assert file.read_bytes() == (written.path / file.name).read_bytes(), file.name
    found = open_bundle(written.path).feed(IDS, every=True)[0]
    assert apart(found, logits_of(zeros, "7", 1e-5, 64e-5, 1e-5)) <= 4 * GRAPH
    coreml = export(source, tmp_path / "coreml", target="coreml", quant="fp16").path
    assert check(coreml, source, n_tokens=16).ok


def test_biases_are_missing_or_there_as_norm_bias_says(tmp_path):
    bare = without_biases(W[16])
    for i, more in enumerate([{}, {"norm_bias": True}]):
        assert re.search("ln.*bias is missing", refused(folder("fla", bare, fla(bare, **more))(tmp_path / f"m{i}")))
    message = refused(folder("fla", W[16], fla(W[16], norm_bias=False))(tmp_path / "both"))
    assert "norm_bias" in message
    assert ".bias" in message
    no_heads = {n: x for n, x in bare.items() if not n.endswith("ln_x.bias")}  # which fla and transformers always have
    assert "ln_x.bias is missing" in refused(folder("fla", no_heads, fla(bare, norm_bias=False))(tmp_path / "heads"))


# --- config.json beside a file ---


def beside(tmp_path, w, config, name="model.safetensors"):
    factory.write_folder(tmp_path / "m", w, "fp32", config=config)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / name)
    return tmp_path / "m" / name


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors"])
def test_config_beside_a_file_that_it_describes_is_read(name, tmp_path):
    w = {n: x for n, x in W[32].items() if n != "head.weight"}
    config = fla(W[32], norm_eps=1e-6, tie_word_embeddings=True)
    file = beside(tmp_path, factory.fla(w), config, name)
    found = open_bundle(export(file, tmp_path / "b", quant="none").path).feed(IDS, every=True)[0]
    expected = logits_of(w | {"head.weight": w["emb.weight"]}, "7", 1e-6, 32e-6, 1e-6)
    assert apart(found, expected) <= 4 * GRAPH


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (fla(W[64], norm_eps=1e-3), "hidden_size"),
        (fla(W[32], norm_eps=1e-3) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "not of an RWKV"),
        (fla(W[32], norm_eps=1e-3) | {"model_type": "rwkv6", "architectures": ["Rwkv6ForCausalLM"]}, "wkv6"),
        (fla(W[32], norm_eps=1e-3, num_hidden_layers=24), "num_hidden_layers"),
        ({"model_type": "rwkv7", "norm_eps": 1e-3}, "has no hidden_size"),
        ({"tie_word_embeddings": "?", "norm_eps": "?"}, "not of an RWKV"),
        ("[1, 2", "cannot be read"),
    ],
)
def test_config_of_another_model_beside_a_file_is_passed_over_and_named(config, reason, tmp_path):
    file = beside(tmp_path, factory.fla(W[32]), {"a": 1})
    (file.parent / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    written = export(file, tmp_path / "b", quant="none")
    assert any("config.json" in note and reason in note for note in written.notes), written.notes
    found = open_bundle(written.path).feed(IDS, every=True)[0]
    assert apart(found, logits_of(W[32], "7", 1e-5, 32e-5, 1e-5)) <= 4 * GRAPH


def test_config_beside_official_names_is_not_asked(tmp_path):
    """A .pth of BlinkDL's among downloads: its eps are those of the code that trained it. A fla file has fla's."""
    (tmp_path / "config.json").write_text(json.dumps(fla(W[32], norm_eps=1e-3, hidden_act="gelu")))
    written = export(factory.write_pth(tmp_path / "m.pth", W[32], "fp32"), tmp_path / "b", quant="none")
    found = open_bundle(written.path).feed(IDS, every=True)[0]
    assert apart(found, logits_of(W[32], "7", 1e-5, 64e-5, 1e-5)) <= 4 * GRAPH
    assert not any("config.json" in note for note in written.notes)
    (tmp_path / "config.json").unlink()
    bare = factory.write_safetensors(tmp_path / "bare.safetensors", factory.fla(W[32]), "F32")
    written = export(bare, tmp_path / "bare", quant="none")
    found = open_bundle(written.path).feed(IDS, every=True)[0]
    assert apart(found, logits_of(W[32], "7", 1e-5, 32e-5, 1e-5)) <= 4 * GRAPH
    assert any("config.json" in note and "1e-05" in note for note in written.notes)


# --- what float16 cannot hold ---


@pytest.mark.parametrize(("n_layer", "eps", "noted"), [(2, 1e-6, False), (24, 1e-6, True), (2, 1e-9, True), (24, 1e-5, False)])
def test_an_eps_that_float16_cannot_hold_is_said(n_layer, eps, noted, tmp_path):
    """At a scale of 1/4, or 1/16 from 24 layers on, float16's smallest number is 2^-24."""
    w = factory.weights(n_layer=n_layer, n_head=1, head_size=64, n_ffn=32, n_vocab=61, ranks=(2, 2, 2, 2), layer0_v=False)
    source = folder("fla", w, fla(w, norm_eps=eps))(tmp_path / "m")
    written = export(source, tmp_path / "b", target="coreml", quant="fp16")
    notes = [note for note in written.notes if "float16 cannot hold norm_eps" in note]
    assert len(notes) == noted
    if noted:
        scale = 1 / 16 if n_layer == 24 else 1 / 4
        assert f"{eps:g}" in notes[0]
        assert f"{2**-24 / scale**2:.2g}" in notes[0]
    assert read_bundle(written.path).manifest["spec"].get("norm_eps") == eps
