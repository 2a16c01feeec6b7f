"""LoRA and initial states: merged and begun from exactly, and refused with one line where they do not fit."""

import json
import re
import shutil
from pathlib import Path

import factory
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import GRAPH, apart

from rwkv_edge import export, open_bundle
from rwkv_edge.check import check
from rwkv_edge.checkpoints import model_id, open_checkpoint
from rwkv_edge.checkpoints.initial_state import read_initial_state
from rwkv_edge.checkpoints.lora import with_lora
from rwkv_edge.cli import cli
from rwkv_edge.convert import quantize
from rwkv_edge.errors import BundleError, CheckpointError, StateError
from rwkv_edge.evaluate import Reference, evaluate

VERSIONS = ["odd", "v4", "v5.0", "v5.1", "v5.2", "v6"]
ODD = factory.weights(**factory.SHAPES["odd"])


def grid(name, shape):
    """Numbers whose products sum exactly, in any arithmetic: 1/64 to 1/4."""
    return np.round(factory.uniform(name, shape, -16, 16)).astype(np.float32) / 64


def lora_of(w, r=4, modules=("att.key", "att.output", "ffn.value")):
    """Factors for these matrices of every layer; and whole, what RWKV-PEFT's train_parts are by default, in the last."""
    last = max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    whole = [n for n in w if re.search(rf"^blocks\.{last}\..*(ln1|time_|x_k|att\.w)", n)]
    found = {name: grid(name, w[name].shape) for name in whole}
    for name, x in w.items():
        if name.endswith(tuple(f"{m}.weight" for m in modules)):
            found[name.removesuffix("weight") + "lora_A"] = grid(name + "A", (r, x.shape[1]))
            found[name.removesuffix("weight") + "lora_B"] = grid(name + "B", (x.shape[0], r))
    return found


def by_hand(w, lora, scale):
    """What the trainers' own merges do, in float64."""
    merged = dict(w)
    for name, x in lora.items():
        if name.endswith("lora_A"):
            module = name.removesuffix(".lora_A")
            module = module if module in w else f"{module}.weight"
            product = lora[name[:-1] + "B"].astype(np.float64) @ x
            merged[module] = (w[module] + scale * product).astype(np.float32)
        elif not name.endswith("lora_B"):
            merged[name] = x
    return merged


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def odd(tmp_path):
    return factory.write_pth(tmp_path / "model.pth", ODD, "fp32")


def refused(checkpoint, lora):
    with pytest.raises(CheckpointError) as e:
        for t in with_lora(open_checkpoint(checkpoint), lora).tensors.values():
            t.read()
    assert "\n" not in str(e.value)
    return str(e.value)


# --- LoRA ---


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_a_merged_bundle_is_that_of_the_checkpoint_merged_by_hand(name, container, tmp_path):
    w = factory.weights(**factory.SHAPES[name])
    lora = lora_of(w)
    source = factory.write_pth(tmp_path / "model.pth", w, "fp32")
    if container == "pth":
        given = factory.write_pth(tmp_path / "lora.pth", lora, "fp32")
    else:
        given = factory.write_safetensors(tmp_path / "lora.safetensors", lora, "F32")
    merged = factory.write_pth(tmp_path / "merged.pth", by_hand(w, lora, 6 / 4), "fp32")
    for quant in ("none", "int4"):
        written = export(source, tmp_path / f"a-{quant}", quant=quant, lora=f"{given}:6")
        assert files(written.path) == files(export(merged, tmp_path / f"b-{quant}", quant=quant).path)
    n = 3 * factory.SHAPES[name]["n_layer"]
    assert (
        written.notes[0]
        == f"{given.name}: {n} matrices of rank 4 merged with alpha 6, other tensors replaced: {len(lora) - 2 * n}"
    )
    assert len(lora) - 2 * n >= 6
    assert written.model_id == model_id(open_checkpoint(merged)) != model_id(open_checkpoint(source))


def test_a_quantized_checkpoint_and_check_and_eval_take_a_lora_too(odd, tmp_path):
    lora = f"{factory.write_pth(tmp_path / 'lora.pth', lora_of(ODD), 'bf16')}:4"
    q = quantize(odd, tmp_path / "q.safetensors", lora=lora)
    assert q.notes
    bundle = export(q.path, tmp_path / "bundle").path
    assert files(bundle) == files(export(odd, tmp_path / "direct", lora=lora).path)
    report = check(bundle, odd, lora=lora, n_tokens=12)
    assert report.ok
    assert report.weights.rms < 0.5
    with pytest.raises(CheckpointError, match="is another model"):
        check(bundle, odd, n_tokens=12)


def test_rows_are_what_the_whole_is_and_factors_of_any_numbers_are_close(odd, tmp_path):
    r, scale = 9, 7 / 9
    a, b = factory.uniform("a", (r, 64), -3, 3), factory.uniform("b", (192, r), -0.01, 2)
    lora = {"blocks.1.ffn.key.lora_A.weight": a, "blocks.1.ffn.key.lora_B.weight": b}
    given = factory.write_pth(tmp_path / "lora.pth", lora, "fp32")
    t = with_lora(open_checkpoint(odd), f"{given}:7").tensors["blocks.1.ffn.key.weight"]
    whole = t.read()
    for step in (1, 7, 64, 191):
        parts = [t.rows(i, min(i + step, 192)) for i in range(0, 192, step)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    exact = ODD["blocks.1.ffn.key.weight"] + scale * (b.astype(np.float64) @ a)
    assert np.abs(whole - exact).max() <= 2**-22 * scale * r * np.abs(a).max() * np.abs(b).max()


@pytest.mark.parametrize("factor", ["att.w1", "att.g2"])
def test_low_rank_factors_are_merged_as_they_are_stored(factor, odd, tmp_path):
    """Their files have the inputs first, and so have their LoRAs."""
    n_in, n_out = ODD[f"blocks.1.{factor}"].shape
    lora = {f"blocks.1.{factor}.lora_A": grid("a", (2, n_out)), f"blocks.1.{factor}.lora_B": grid("b", (n_in, 2))}
    given = factory.write_pth(tmp_path / "lora.pth", lora, "fp32")
    t = with_lora(open_checkpoint(odd), f"{given}:2").tensors[f"blocks.1.{factor}"]
    np.testing.assert_array_equal(t.read(), by_hand(ODD, lora, 1)[f"blocks.1.{factor}"].T)
    np.testing.assert_array_equal(t.rows(1, 3), t.read()[1:3])
    given = factory.write_pth(tmp_path / "lora.pth", {n: x.T for n, x in lora.items()}, "fp32")
    assert re.search(
        rf"lora\.pth: blocks\.1\.{factor} has lora_A .*, expected \(r, {n_out}\) and \({n_in}, r\)", refused(odd, f"{given}:2")
    )


def test_whole_low_rank_factors_and_tensors_that_no_step_reads(odd, tmp_path):
    lora = lora_of(ODD) | {
        "blocks.1.att.w1": grid("w1", ODD["blocks.1.att.w1"].shape),
        "blocks.0.att.v0": ODD["blocks.0.att.v0"],
    }
    given = factory.write_pth(tmp_path / "lora.pth", lora, "fp32")
    t = with_lora(open_checkpoint(odd), f"{given}:2").tensors["blocks.1.att.w1"]
    np.testing.assert_array_equal(t.read(), lora["blocks.1.att.w1"].T)


@pytest.mark.parametrize("name", ["emb", "blocks.1.ffn.s_emb", "emb.weight", "blocks.0.ln0.bias", "blocks.1.ffn.s_emb.weight"])
def test_what_rwkv_7a_s_tables_are_made_of_is_not_merged(name, tmp_path):
    w = factory.weights(**factory.SHAPES["v7a"])
    model, lora = factory.write_pth(tmp_path / "m.pth", w), lora_of(w, modules=("att.key",))
    assert with_lora(open_checkpoint(model), f"{factory.write_pth(tmp_path / 'good.pth', lora)}:4").notes
    lora |= {name: w[name]} if name in w else lora_of(w, modules=(name,))
    message = refused(model, f"{factory.write_pth(tmp_path / 'bad.pth', lora)}:4")
    assert (
        f": {name if name in w else f'{name}.weight'} makes RWKV-7a's tables, and no LoRA of it can be merged here" in message
    )


def peft(folder, lora, **settings):
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{n}.weight" if ".lora_" in n else f"base_model.model.{n}": x for n, x in lora.items()}
    factory.write_safetensors(folder / "adapter_model.safetensors", named, "F32")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "init_lora_weights": True, "alpha_pattern": {}} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_peft_s_folders_say_their_alpha(odd, tmp_path):
    folder, lora = peft(tmp_path / "adapter", lora_of(ODD)), lora_of(ODD)
    name = "blocks.1.att.key.weight"
    for given, scale in ((folder, 6 / 4), (folder / "adapter_model.safetensors", 6 / 4), (f"{folder}:8", 2)):
        t = with_lora(open_checkpoint(odd), given).tensors[name]
        np.testing.assert_array_equal(t.read(), by_hand(ODD, lora, scale)[name])
    peft(folder, lora, use_rslora=True)
    np.testing.assert_array_equal(with_lora(open_checkpoint(odd), folder).tensors[name].read(), by_hand(ODD, lora, 3)[name])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("rwkv.blocks.1.attention.receptance", "att.receptance"),
        ("rwkv.blocks.1.feed_forward.value", "ffn.value"),
        ("rwkv7.blocks.1.att.output", "att.output"),
        ("model.layers.1.attn.r_proj", "att.receptance"),
        ("model.layers.1.attn.k_proj", "att.key"),
        ("model.layers.1.attn.v_proj", "att.value"),
        ("model.layers.1.attn.o_proj", "att.output"),
        ("model.layers.1.ffn.key", "ffn.key"),
    ],
)
def test_what_transformers_and_fla_call_the_linear_layers(theirs, ours, odd, tmp_path):
    name = f"blocks.1.{ours}.weight"
    lora = lora_of({name: ODD[name]}, modules=[ours])
    given = peft(tmp_path / "adapter", {n.replace(name.removesuffix(".weight"), theirs): x for n, x in lora.items()})
    merged = with_lora(open_checkpoint(odd), given)
    np.testing.assert_array_equal(merged.tensors[name].read(), by_hand(ODD, lora, 6 / 4)[name])
    assert [n for n, t in merged.tensors.items() if t.plus] == [name]
    twice = factory.write_pth(tmp_path / "twice.pth", lora | {f"model.{n}": x for n, x in lora.items()}, "fp32")
    assert "has one tensor under two names: give a file with one LoRA" in refused(odd, f"{twice}:4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "is of a LOHA adapter: only LORA, BONE, MISS can be merged"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4', which changed the model too"),
        ({"use_dora": True}, "has use_dora True, which is not supported: merge it with peft"),
        ({"alpha_pattern": {"key": 3}}, "has alpha_pattern {'key': 3}, which is not supported: merge it with peft"),
        ({"lora_alpha": "6"}, "has lora_alpha '6': expected a number above 0"),
        ({"lora_alpha": True}, "has lora_alpha True: expected a number above 0"),
    ],
)
def test_peft_s_other_adapters_are_refused(settings, message, odd, tmp_path):
    assert message in refused(odd, peft(tmp_path / "adapter", lora_of(ODD), **settings))


def test_a_damaged_config_is_refused(odd, tmp_path):
    folder = peft(tmp_path / "adapter", lora_of(ODD))
    for text in ("{", "[]", "{}", "\xff"):
        (folder / "adapter_config.json").write_text(text, "latin-1")
        assert "is damaged or not peft's: it has no peft_type and lora_alpha" in refused(odd, folder)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "blocks.0.att.key.init_lora_A",
            "is the start of a PiSSA: only LoRA can be merged (it has 'blocks.0.att.key.init_lora_A')",
        ),
        ("blocks.0.att.key.lora_magnitude_vector", "is a DoRA"),
        ("emb.lora_embedding_A", "is a LoRA of the embedding table"),
        ("blocks.0.att.key.bone", "is a Bone adapter"),
        ("blocks.0.att.key.disha", "is a DiSHA adapter"),
        ("blocks.0.att.key.lora.0", "is a LoRA that was converted for web-rwkv"),
        ("blocks.0.att.time_state", "is an initial state, which --initial-state takes and not --lora"),
        ("blocks.0.att.key.lora_C", "blocks.0.att.key.lora_C is no tensor of this RWKV-7 of 2 layers: it is another model's"),
        ("blocks.9.ln1.weight", "blocks.9.ln1.weight is no tensor of this RWKV-7 of 2 layers"),
    ],
)
def test_other_adapters_are_refused_by_the_key_that_tells(key, message, odd, tmp_path):
    given = factory.write_pth(tmp_path / "lora.pth", lora_of(ODD) | {key: np.ones((4, 64), np.float32)}, "fp32")
    found = refused(odd, f"{given}:4")
    assert found.startswith(str(given))
    assert message in found


KEY = "blocks.0.att.key"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{KEY}.lora_B": None}, f"{KEY} has a lora_A and not the other factor: the file is not whole"),
        ({f"{KEY}.lora_A": None}, f"{KEY} has a lora_B and not the other factor: the file is not whole"),
        (
            {f"{KEY}.lora_A": (5, 64)},
            f"{KEY} has lora_A (5, 64) and lora_B (64, 4), expected (r, 64) and (64, r): it is another model's LoRA",
        ),
        ({f"{KEY}.lora_A": (4, 32)}, f"{KEY} has lora_A (4, 32) and lora_B (64, 4), expected (r, 64) and (64, r)"),
        ({f"{KEY}.lora_A": (64,)}, f"{KEY} has lora_A (64,) and lora_B (64, 4), expected (r, 64) and (64, r)"),
        ({"blocks.9.att.key.lora_A": (4, 64)}, "blocks.9.att.key.weight is no tensor of this RWKV-7 of 2 layers"),
        ({"ln_out.lora_A": (4, 64)}, "ln_out.weight is no matrix, and has a LoRA"),
        ({"ln_out.bias": (32,)}, "ln_out.bias has shape (32,), expected (64,): it is another model's LoRA"),
        ({f"{KEY}.lora_A": np.nan}, f"{KEY}.lora_A holds a nan at [0, 0]"),
        ({f"{KEY}.lora_B": np.inf}, f"{KEY}.lora_B holds a inf at [0, 0]"),
        ({f"{KEY}.lora_B": 3e38}, f"{KEY}.weight overflows with it: is alpha right, 1 times r?"),
        ({"ln_out.bias": np.nan}, "ln_out.bias holds a nan at [0]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, odd, tmp_path):
    lora = lora_of(ODD) | {"ln_out.bias": ODD["ln_out.bias"]}
    for name, x in change.items():
        if x is None:
            del lora[name]
        elif isinstance(x, tuple):
            lora[name] = np.ones(x, np.float32)
        else:
            lora[name] = np.full_like(lora[name], x)
            lora[f"{KEY}.lora_A"][:1] = x if name.endswith("A") else 8
    given = factory.write_pth(tmp_path / "lora.pth", lora, "fp32")
    assert message in refused(odd, f"{given}:4")


def test_what_is_no_lora_is_refused(odd, tmp_path):
    lora = factory.write_pth(tmp_path / "lora.pth", lora_of(ODD), "fp32")
    q = quantize(odd, tmp_path / "q.safetensors").path
    assert (
        refused(odd, odd) == f"{odd} is no LoRA: it has no '...lora_A', but blocks.0.att.a0, blocks.0.att.a1, blocks.0.att.a2"
    )
    assert refused(odd, q).startswith(f"{q} is no LoRA: it has no '...lora_A', but")
    assert refused(q, f"{lora}:4") == f"{q} is quantized already: merge {lora} into the original checkpoint"
    assert f"{lora} does not say its alpha: give {lora}:ALPHA, the lora_alpha it was trained with" in refused(odd, lora)
    assert "No such file" in refused(odd, tmp_path / "none.pth")
    assert "No such file" in refused(odd, f"{tmp_path / 'none.pth'}:4")
    assert "adapter_model.safetensors: No such file" in refused(odd, tmp_path)
    for alpha in ("0", "-1", "nan", "inf"):
        assert f"alpha {alpha} of {lora} is not possible: expected a number above 0" in refused(odd, f"{lora}:{alpha}")
    assert f"{lora}:x" in refused(odd, f"{lora}:x")


def test_names_with_colons(odd, tmp_path, monkeypatch):
    """A file of the whole name is that file; a drive letter is no file, and what follows it no alpha."""
    monkeypatch.chdir(tmp_path)
    expected = by_hand(ODD, lora_of(ODD), 1)["blocks.0.att.key.weight"]
    for file, given in (("a:b.pth", "a:b.pth:4"), ("C:\\x.pth", "C:\\x.pth:4"), ("l:2", "l:2:4")):
        factory.write_pth(Path(file), lora_of(ODD), "fp32")
        t = with_lora(open_checkpoint(odd), given).tensors["blocks.0.att.key.weight"]
        np.testing.assert_array_equal(t.read(), expected)
        assert f"{file} does not say its alpha" in refused(odd, file)
    assert "cannot read C:\\none.pth" in refused(odd, "C:\\none.pth")


# --- initial states ---


def state_of(spec, scale=1.0):
    shape = (spec.n_head, spec.head_size, spec.head_size)
    return {f"blocks.{i}.att.time_state": scale * factory.uniform(f"S{i}", shape) for i in range(spec.n_layer)}


def norm(x, weight, bias, eps=1e-5, groups=1):
    x = x.reshape(groups, -1).astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x.reshape(-1) * weight + bias


@pytest.mark.parametrize("version", ["5.0", "5.1", "5.2", "6", "7"])
def test_files_hold_head_value_key(version, tmp_path):
    """A layer that writes nothing and forgets nothing reads S r: computed here from a file's own tensors."""
    sizes = dict(n_layer=1, n_head=2, head_size=16, n_ffn=64, n_vocab=30)
    if version == "7":
        w = factory.weights(**sizes, ranks=(4, 4, 4, 4), layer0_v=False)
    else:
        w = factory.weights(version, **sizes, **({"ranks": (4, 4)} if version == "6" else {}))
    att = "blocks.0.att."
    silent = ("key.weight", "value.weight", "x_r", "x_g", "time_maa_w1", "time_maa_r", "time_maa_g", "att.w2")
    w |= {n: np.zeros_like(x) for n, x in w.items() if n.endswith(silent)}
    w |= {n: np.ones_like(x) for n, x in w.items() if n.endswith(("time_mix_r", "time_mix_g"))}
    w |= {n: np.full_like(x, -40) for n, x in w.items() if n.endswith(("att.w0", "time_decay"))}
    source = factory.write_pth(tmp_path / "model.pth", w, "fp32")
    spec = open_checkpoint(source).spec
    file = state_of(spec)

    x = norm(w["emb.weight"][7], w["blocks.0.ln0.weight"], w["blocks.0.ln0.bias"])
    z = norm(x, w["blocks.0.ln1.weight"], w["blocks.0.ln1.bias"])
    r = (w[f"{att}receptance.weight"] @ z).reshape(2, 16)
    y = np.zeros((2, 16))
    for h in range(2):
        for value in range(16):
            for key in range(16):
                y[h, value] += file[f"{att}time_state"][h, value, key] * r[h, key]
    y = norm(y, w[f"{att}ln_x.weight"], w[f"{att}ln_x.bias"], eps=64e-5, groups=2)
    if version == "7":
        y = y * (1 / (1 + np.exp(-(z @ w[f"{att}g1"]))) @ w[f"{att}g2"])
    elif version != "5.0":
        gate = w[f"{att}gate.weight"] @ z
        y = y * gate / (1 + np.exp(-gate))
    x = x + w[f"{att}output.weight"] @ y
    expected = w["head.weight"] @ norm(x, w["ln_out.weight"], w["ln_out.bias"])

    given = factory.write_pth(tmp_path / "state.pth", file, "fp32")
    for wkv in ("attention", "plain", "step"):
        bundle = export(source, tmp_path / wkv, quant="none", wkv=wkv, initial_state=given).path
        assert apart(open_bundle(bundle).feed([7])[0], expected) <= GRAPH
    exchanged = factory.write_pth(tmp_path / "other.pth", {n: S.swapaxes(1, 2) for n, S in file.items()}, "fp32")
    bundle = export(source, tmp_path / "other", quant="none", initial_state=exchanged).path
    assert apart(open_bundle(bundle).feed([7])[0], expected) > 0.1


TUNED = factory.weights(**factory.SHAPES["odd"] | {"n_vocab": 257})


@pytest.fixture
def tuned(tmp_path):
    """A checkpoint with a vocabulary of bytes; a bundle of it with an initial state, and one without."""
    source = factory.write_pth(tmp_path / "source.pth", TUNED, "fp32")
    (tmp_path / "vocab.txt").write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)))
    given = factory.write_safetensors(tmp_path / "state.safetensors", state_of(open_checkpoint(source).spec), "F32")
    options = {"quant": "none", "tokenizer": tmp_path / "vocab.txt"}
    bundle = export(source, tmp_path / "tuned", initial_state=given, **options).path
    return source, bundle, export(source, tmp_path / "plain", **options).path


def test_every_text_begins_from_the_initial_state(tuned, tmp_path):
    model, plain = map(open_bundle, tuned[1:])
    assert model.bundle.model_id == plain.bundle.model_id == model.first.model_id
    assert (model.first.n_tokens, model.first.logits, plain.first) == (0, None, None)
    manifest = json.loads((tuned[1] / "manifest.json").read_text())
    assert manifest["initial_state"] == "initial_state.safetensors" in manifest["files"]
    assert json.loads((tuned[2] / "manifest.json").read_text())["initial_state"] is None

    ids = factory.tokens(20, 257)
    logits, state = model.feed(ids)
    assert apart(logits, plain.feed(ids)[0]) > 0.1
    np.testing.assert_array_equal(plain.feed(ids, model.first)[0], logits)
    assert [t.id for t in model.generate(ids, max_tokens=5, temperature=0)] == [
        t.id for t in plain.generate(ids, model.first, max_tokens=5, temperature=0)
    ]
    assert state.n_tokens == 20
    state.save(tmp_path / "s")  # goes from one to the other, and is no longer the initial one
    np.testing.assert_array_equal(plain.feed([1], plain.load_state(tmp_path / "s"))[0], model.feed([1], state)[0])


def test_check_and_eval_follow(tuned, tmp_path, monkeypatch):
    source, bundle, plain = tuned
    report = check(bundle, source, n_tokens=20)
    assert report.ok
    assert report.weights.max_abs < 1e-6
    text = ["ABCDEFGHIJKLMNOP" * 3]
    with_state, without = (evaluate([b], text, against=source).scores for b in (bundle, plain))
    for scores in (with_state, without):
        assert scores[0].perplexity.value == pytest.approx(scores[1].perplexity.value, rel=1e-4)
    assert with_state[0].perplexity.value != pytest.approx(without[0].perplexity.value, rel=1e-2)

    seen = []

    class Seen(Reference):
        def __init__(self, checkpoint, first=None):
            seen.append(first is not None)
            super().__init__(checkpoint, first)

    monkeypatch.setattr("rwkv_edge.evaluate.Reference", Seen)
    other = factory.write_pth(tmp_path / "other.pth", TUNED | {"ln_out.bias": TUNED["ln_out.bias"] + 1}, "fp32")
    for against in (source, other):  # the state belongs to one of them
        evaluate([bundle], text, against=against)
    assert seen == [True, False]


def test_check_fails_if_the_graph_and_the_reference_begin_apart(tuned, monkeypatch):
    from rwkv_edge import check as module

    reference = module.run_reference
    monkeypatch.setattr(module, "run_reference", lambda spec, w, ids, first=None, **o: reference(spec, w, ids, **o))
    assert not check(tuned[1], n_tokens=20).ok


def test_the_same_bytes_and_from_a_quantized_checkpoint_too(tuned, tmp_path):
    given = factory.write_pth(tmp_path / "state.pth", state_of(open_checkpoint(tuned[0]).spec), "fp32")
    q = quantize(tuned[0], tmp_path / "q.safetensors", quant="none").path
    again = export(q, tmp_path / "again", initial_state=given, tokenizer=tmp_path / "vocab.txt").path
    assert files(again) == files(tuned[1])


def test_a_bundle_s_initial_state_is_checked_when_it_is_opened(tuned, tmp_path):
    def damaged(change):
        path = tmp_path / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tuned[1], path)
        manifest = json.loads((path / "manifest.json").read_text())
        change(path, manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises((StateError, BundleError)) as e:
            open_bundle(path, verify=False)
        return str(e.value)

    def of_another(path, manifest):
        manifest["model_id"] = "0" * 64

    assert "belongs to another model" in damaged(of_another)
    assert "uses 'x' but does not list it under files" in damaged(lambda path, m: m.update(initial_state="x"))
    assert "manifest.initial_state is '1'" in damaged(lambda path, m: m.update(initial_state=1))
    assert "is damaged or not a state file" in damaged(lambda path, m: m.update(initial_state="model.onnx"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("blocks.1.att.time_state"),
            "has 1 layers, expected 2: it is another model's ('blocks.1.att.time_state')",
        ),
        (lambda s: s.update({"blocks.2.att.time_state": s["blocks.0.att.time_state"]}), "has 3 layers, expected 2"),
        (
            lambda s: s.update({"blocks.1.att.time_state": np.ones((4, 16, 8), np.float32)}),
            "blocks.1.att.time_state has shape (4, 16, 8), expected (4, 16, 16): it is another model's",
        ),
        (lambda s: s["blocks.1.att.time_state"].__setitem__((1, 2, 3), np.nan), "holds a nan at [1, 2, 3]"),
        (
            lambda s: s.update({"blocks.0.att.key.lora_A": np.ones((4, 64), np.float32)}),
            "is a LoRA (--lora takes one): it has 'blocks.0.att.key.lora_A'",
        ),
        (lambda s: s.update({"emb.weight": ODD["emb.weight"]}), "is no initial state: it has 'emb.weight', expected"),
        (lambda s: s.update({"blocks.0.att.time_offset": np.ones(64, np.float32)}), "is no initial state: it has"),
    ],
)
def test_what_is_no_initial_state_is_refused(change, message, odd, tmp_path):
    state = state_of(open_checkpoint(odd).spec)
    change(state)
    given = factory.write_pth(tmp_path / "state.pth", state, "fp32")
    with pytest.raises(CheckpointError) as e:
        export(odd, tmp_path / "out", initial_state=given)
    assert message in str(e.value)
    assert str(given) in str(e.value)
    assert not (tmp_path / "out").exists()


def test_initial_states_whose_layout_is_not_known_or_that_no_memory_takes(odd, tmp_path):
    spec = open_checkpoint(odd).spec
    given = factory.write_safetensors(tmp_path / "state.st", state_of(spec), "F16")
    with pytest.raises(CheckpointError, match=r"was converted for web-rwkv, and does not say whether its axes are exchanged"):
        read_initial_state(given, spec)
    with pytest.raises(CheckpointError, match="No such file"):
        read_initial_state(tmp_path / "none.pth", spec)
    four = factory.write_pth(tmp_path / "4.pth", factory.weights(**factory.SHAPES["v4"]), "fp32")
    with pytest.raises(CheckpointError, match="RWKV-4 has no memory in matrices, so no initial state fits it"):
        export(four, tmp_path / "out", initial_state=given)


# --- the command line ---


def test_a_device_is_not_read(odd):
    with pytest.raises(CheckpointError, match="/dev/zero is no regular file"):
        read_initial_state("/dev/zero", open_checkpoint(odd).spec)
    assert refused(odd, "/dev/zero:4") == "/dev/zero is no regular file"


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_the_command_line(odd, tmp_path):
    lora = f"{factory.write_pth(tmp_path / 'lora.pth', lora_of(ODD), 'fp32')}:4"
    state = factory.write_pth(tmp_path / "state.pth", state_of(open_checkpoint(odd).spec), "fp32")
    done = run("export", odd, "--lora", lora, "--initial-state", state, "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "lora.pth: 6 matrices of rank 4 merged with alpha 4, other tensors replaced: 7" in done.stderr
    assert open_bundle(tmp_path / "out").first
    assert run("check", tmp_path / "out", "--against", odd, "--lora", lora, "-n", "12").exit_code == 0
    assert run("quantize", odd, "--lora", lora, "-o", tmp_path / "q.safetensors", "-q").exit_code == 0
    assert files(tmp_path / "out") == files(export(tmp_path / "q.safetensors", tmp_path / "b", initial_state=state).path)
    for command in ("check", "eval"):
        alone = run(command, tmp_path / "out", "--lora", lora)
        assert alone.exit_code == 2
        assert "--lora is merged into the checkpoint of --against: give that too." in alone.stderr
    wrong = run("export", odd, "--initial-state", lora[:-2], "-o", tmp_path / "no")
    assert wrong.exit_code == 1
    assert "is a LoRA (--lora takes one)" in wrong.stderr
