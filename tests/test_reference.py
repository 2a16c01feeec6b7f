"""Our numbers against the rwkv package's, live: `make reference`. Needs torch."""

from pathlib import Path

import factory
import numpy as np
import pytest
from conftest import DEMO, LIVE, apart
from make_goldens import run_in_a_process

from rwkv_edge.checkpoints import open_checkpoint
from rwkv_edge.checkpoints.initial_state import read_initial_state
from rwkv_edge.reference import run_reference

pytestmark = pytest.mark.reference

SHAPES = {
    **factory.SHAPES,
    "small-heads": dict(n_layer=3, n_head=6, head_size=8, n_ffn=160, n_vocab=50, ranks=(3, 4, 5, 6), layer0_v=False),
    "wide": dict(n_layer=4, n_head=4, head_size=64, n_ffn=1024, n_vocab=300, ranks=(64, 64, 32, 128), layer0_v=False),
    "v7a wide": dict(
        version="7a", n_layer=2, n_head=2, head_size=64, n_ffn=512, n_vocab=96, ranks=(32, 32, 16, 48), layer0_v=False
    ),
    "v4 wide": dict(version="4", n_layer=3, n_embd=128, n_ffn=512, n_vocab=300),
    "v4 odd": dict(version="4", n_layer=2, n_embd=36, n_ffn=100, n_vocab=33),
    "v5.0 heads of 8": dict(version="5.0", n_layer=3, n_head=5, head_size=8, n_ffn=160, n_vocab=50),
    "v5.0 heads of 64": dict(version="5.0", n_layer=2, n_head=2, head_size=64, n_ffn=512, n_vocab=96),
    "v5.1 heads of 8": dict(version="5.1", n_layer=3, n_head=5, head_size=8, n_ffn=140, n_vocab=50),
    "v5.1 heads of 64": dict(version="5.1", n_layer=2, n_head=2, head_size=64, n_ffn=448, n_vocab=96),
    "v5.2 heads of 8": dict(version="5.2", n_layer=3, n_head=5, head_size=8, n_ffn=140, n_vocab=50),
    "v5.2 heads of 64": dict(version="5.2", n_layer=2, n_head=2, head_size=64, n_ffn=448, n_vocab=96),
    "v6 heads of 8": dict(version="6", n_layer=3, n_head=5, head_size=8, n_ffn=140, n_vocab=50, ranks=(3, 11)),
    "v6 heads of 64": dict(version="6", n_layer=2, n_head=2, head_size=64, n_ffn=448, n_vocab=96, ranks=(32, 64)),
    "one-layer": dict(n_layer=1, n_head=2, head_size=16, n_ffn=96, n_vocab=33, ranks=(4, 4, 4, 4), layer0_v=True),
}


@pytest.mark.parametrize("one_by_one", [True, False], ids=["token by token", "sequence"])
@pytest.mark.parametrize("name", ["demo", *SHAPES])
def test_the_rwkv_package_agrees(name, one_by_one, tmp_path):
    pth = DEMO if name == "demo" else factory.write_pth(tmp_path / "m.pth", factory.weights(**SHAPES[name]), "fp32")
    checkpoint = open_checkpoint(pth)
    ids = factory.tokens(160, checkpoint.spec.n_vocab)
    expected, end = run_in_a_process(pth, ids, version=checkpoint.spec.version, one_by_one=one_by_one)
    logits, state = run_reference(checkpoint.spec, {n: t.read() for n, t in checkpoint.tensors.items()}, ids)
    assert apart(logits, expected) <= LIVE
    assert max(apart(state[n], x) for n, x in end.items()) <= LIVE


@pytest.mark.parametrize("name", list(factory.BEFORE_7)[1:])
def test_the_rwkv_package_begins_from_the_same_initial_state(name, tmp_path):
    """It takes time_state from the model's own file."""
    w = factory.weights(**factory.SHAPES[name])
    spec = open_checkpoint(factory.write_pth(tmp_path / "m.pth", w, "fp32")).spec
    shape = (spec.n_head, spec.head_size, spec.head_size)
    first = {n: factory.uniform(n, shape) for n in (f"blocks.{i}.att.time_state" for i in range(spec.n_layer))}
    ids = factory.tokens(40, spec.n_vocab)
    expected, _ = run_in_a_process(factory.write_pth(tmp_path / "both.pth", w | first, "fp32"), ids, version=spec.version)
    begin = read_initial_state(factory.write_pth(tmp_path / "state.pth", first, "fp32"), spec)
    weights = {n: t.read() for n, t in open_checkpoint(tmp_path / "m.pth").tensors.items()}
    assert apart(run_reference(spec, weights, ids, begin)[0], expected) <= LIVE
    assert apart(run_reference(spec, weights, ids)[0], expected) > 0.1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_torch_reads_and_writes_the_same_file(dtype, tmp_path):
    """A checkpoint saved by torch itself, also as views of one storage, and ours read by torch."""
    import torch

    w = factory.weights(**factory.SHAPES["odd"])
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tensors = {name: torch.from_numpy(x).to(kind) for name, x in w.items()}
    both = torch.cat([tensors["ln_out.weight"], tensors["ln_out.bias"]])
    tensors["ln_out.weight"], tensors["ln_out.bias"] = both[:64], both[64:]
    tensors["head.weight"] = torch.nn.Parameter(tensors["head.weight"])
    torch.save(tensors, tmp_path / "theirs.pth")
    ours = factory.write_pth(tmp_path / "ours.pth", w, dtype)
    a, b = open_checkpoint(tmp_path / "theirs.pth"), open_checkpoint(ours)
    for name, t in a.tensors.items():
        np.testing.assert_array_equal(t.read(), b.tensors[name].read(), err_msg=name)
    for name, x in torch.load(ours, weights_only=True).items():
        assert torch.equal(x, tensors[name].detach()), name


@pytest.mark.parametrize("settings", [(0.4, 0.4, 0.996), (2.0, 0.0, 0.5), (0.0, 3.0, 0.9)])
def test_penalties_and_bans_are_the_rwkv_package_s(settings, model):
    """Its own loop, on our logits: the same tokens, digits among them."""
    import torch
    from rwkv.utils import PIPELINE, PIPELINE_ARGS

    ours, (presence, frequency, decay) = model("demo", quant="none"), settings

    class Stub:
        def forward(self, tokens, state):
            logits, state = ours.feed(tokens, state)
            return torch.from_numpy(logits), state

    prompt, ban = "Count: 1 2 3 1 2 3 1 2 3 1 2 3", [0, ours.token("\n")]
    args = PIPELINE_ARGS(temperature=0, alpha_presence=presence, alpha_frequency=frequency, alpha_decay=decay, token_ban=ban)
    theirs = []
    pipeline = PIPELINE(Stub(), str(DEMO.with_name("tokenizer.json")))
    sample_logits = pipeline.sample_logits
    pipeline.sample_logits = lambda *a, **k: theirs.append(sample_logits(*a, **k)) or theirs[-1]
    pipeline.generate(prompt, token_count=150, args=args)
    found = ours.generate(
        prompt,
        max_tokens=150,
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        penalty_decay=decay,
        ban=ban,
    )
    ids = [t.id for t in found]
    assert ids == theirs
    assert any(ours.tokenizer.decode([i]).isdigit() for i in ids)


@pytest.mark.parametrize("settings", [(1.0, 0.5, 0), (0.7, 0.85, 0), (1.3, 0.9, 3), (2.0, 1.0, 5)])
def test_top_p_top_k_and_temperature_are_the_rwkv_package_s(settings):
    """Its probabilities, taken where it draws."""
    import torch
    from rwkv.utils import PIPELINE

    from rwkv_edge.runtime.sampling import Sampling, candidates

    temperature, top_p, top_k = settings
    logits = (3 * np.random.default_rng(0).standard_normal(1000)).astype(np.float32)
    drawn = []
    choice = np.random.choice
    try:
        np.random.choice = lambda a, p: drawn.append(p) or 0
        PIPELINE.sample_logits(None, torch.from_numpy(logits), temperature, top_p, top_k)
    finally:
        np.random.choice = choice
    kept, log_p = candidates(logits, Sampling(temperature, top_p=top_p, top_k=top_k))
    p = np.zeros(1000)
    p[kept] = np.exp(log_p / temperature)
    np.testing.assert_allclose(p / p.sum(), drawn[0], rtol=1e-4, atol=1e-9)


def test_world_is_the_rwkv_package_s():
    """10 MB of scripts, emoji, code, numbers, broken UTF-8 and line ends, token for token."""
    import rwkv.rwkv_tokenizer as theirs
    from rwkv import __file__ as package

    from rwkv_edge.tokenizer import WORLD, World

    vocabulary = Path(package).with_name("rwkv_vocab_v20230424.txt")
    assert WORLD.read_bytes() == vocabulary.read_bytes()
    ours, reference = World(WORLD), theirs.TRIE_TOKENIZER(str(vocabulary))
    rng = np.random.default_rng(0)
    tokens = list(ours._ids)
    sources = [
        lambda: " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 40)).encode(),
        lambda: "".join(map(chr, rng.integers(0x20, 0x2FFF, 60))).encode(),
        lambda: "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 40))).encode(),
        lambda: "".join(map(chr, rng.integers(0x1F300, 0x1FAFF, 20))).encode(),
        lambda: b"".join(tokens[i] for i in rng.integers(0, len(tokens), 30)),
        lambda: rng.bytes(60),
        lambda: [b"\r\n", b"\n\n", b" " * int(rng.integers(1, 150)), b"\t\t"][int(rng.integers(0, 4))],
        lambda: str(rng.integers(0, 10**12)).encode(),
    ]
    parts, size = [], 0
    while size < 10_000_000:
        parts.append(sources[int(rng.integers(0, len(sources)))]())
        size += len(parts[-1])
    data = b"".join(parts)
    ids = ours.encode(data)
    assert ids == reference.encodeBytes(data)
    assert ours.decode_bytes(ids) == reference.decodeBytes(ids) == data


WORDS = DEMO.with_name("stories.txt").read_text().split()
