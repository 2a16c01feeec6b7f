"""How well a model predicts text: the figures against those computed by hand."""

import json
import math

import factory
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DEMO

from rwkv_edge import export
from rwkv_edge.cli import cli
from rwkv_edge.errors import BundleError, InputError
from rwkv_edge.evaluate import PIECE, Estimate, _ratio, documents, evaluate, last_words
from rwkv_edge.models import rwkv7

STORIES = DEMO.with_name("stories.txt")


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))


def test_the_figures_are_those_computed_by_hand(bundle, model):
    """Two documents, two bundles: every figure from the logits, in one formula each."""
    texts = ["Once upon a time there was a dog.", "The sun was warm, and the wind was cold. " * 20]
    one, two = model("demo", quant="none"), model("demo", quant="int4")
    nll, other, kl, same, n_bytes, n_tokens = [], [], [], [], [], []
    for text in texts:
        ids = [0, *one.encode(text)]
        p, q = (log_softmax(m.feed(ids[:-1], every=True)[0]) for m in (one, two))
        at = np.arange(len(ids) - 1), np.asarray(ids[1:])
        nll.append(-p[at])
        other.append(-q[at])
        kl.append((np.exp(p) * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        n_bytes.append(len(text.encode()))
        n_tokens.append(len(ids) - 1)
    found = evaluate([bundle("demo", quant="none"), bundle("demo", quant="int4")], texts)
    assert (found.n_documents, found.n_predictions, found.n_bytes) == (2, sum(n_tokens), sum(n_bytes))
    first, second = found.scores
    nll, other, kl, same = map(np.concatenate, (nll, other, kl, same))
    assert first.perplexity.value == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert first.bits_per_byte.value == pytest.approx(nll.sum() / math.log(2) / sum(n_bytes), rel=1e-4)
    assert (first.percent, first.kl, first.top1) == (None, None, None)
    assert second.perplexity.value == pytest.approx(math.exp(other.mean()), rel=1e-3)
    assert second.percent.value == pytest.approx(100 * math.expm1((other - nll).mean()), abs=0.1)
    assert second.kl.value == pytest.approx(kl.mean(), rel=0.02)
    assert second.top1.value == pytest.approx(same.mean(), abs=0.02)
    assert 0 < second.percent.error < first.perplexity.error / first.perplexity.value * 100


def test_windows_begin_anew(bundle, model):
    m, text = model("demo", quant="none"), STORIES.read_text().split("<|end")[0]
    ids = m.encode(text)
    windows = [ids[i : i + 50] for i in range(0, len(ids), 50)]
    nll = [-log_softmax(m.feed(w[:-1], every=True)[0])[np.arange(len(w) - 1), w[1:]] for w in windows if len(w) > 1]
    found = evaluate([bundle("demo", quant="none")], [text], window=50)
    assert found.n_predictions == sum(map(len, nll))
    assert found.scores[0].perplexity.value == pytest.approx(math.exp(np.concatenate(nll).mean()), rel=1e-4)
    limited = evaluate([bundle("demo", quant="none")], [text], window=50, limit=2)
    assert limited.n_predictions == 98
    assert limited.scores[0].perplexity.value == pytest.approx(math.exp(np.concatenate(nll[:2]).mean()), rel=1e-4)


def test_against_a_checkpoint_is_against_float32(bundle):
    """The checkpoint's own bundle in float32 costs nothing; int8 a little, int4 more."""
    paths = [bundle("demo", quant=q) for q in ("none", "int8", "int4")]
    checkpoint, *scores = evaluate(paths, documents(STORIES), against=DEMO, limit=1).scores
    assert checkpoint.name == DEMO.name
    assert scores[0].kl.value < 1e-8 < scores[1].kl.value < scores[2].kl.value / 10 < 0.01
    assert scores[0].top1.value == 1
    assert abs(scores[0].percent.value) < 1e-3
    exact = evaluate(paths[2:], documents(STORIES), against=DEMO, limit=1, exact=True).scores[1]
    assert exact.kl.value == pytest.approx(scores[2].kl.value, rel=0.1)
    assert exact.kl.value != scores[2].kl.value


def test_standard_errors():
    """Of a ratio: as by drawing anew, where pieces are of different length."""
    rng = np.random.default_rng(0)

    def draw():
        n = rng.integers(10, 65, 60)
        return np.array([rng.exponential(2.0, k).sum() for k in n]), n.astype(float)

    values = [_ratio(*draw()) for _ in range(400)]
    assert np.mean([v.value for v in values]) == pytest.approx(2, abs=0.01)
    assert np.mean([v.error for v in values]) == pytest.approx(np.std([v.value for v in values]), rel=0.1)
    assert _ratio(np.array([4.0]), np.array([2.0])) == Estimate(2.0, None)
    assert PIECE == 64


def test_last_words(bundle, model):
    m = model("demo", quant="none")
    prompt = "Once upon a time, there was a little"
    word = "".join(t.text for t in m.generate([0, *m.encode(prompt)], max_tokens=1, temperature=0)).strip()
    texts = [f"{prompt} {word}", f"{prompt} hippopotamus", f"{prompt} {word}\n"]
    (found,) = last_words([bundle("demo", quant="none")], texts)
    assert found.accuracy.value == pytest.approx(2 / 3)
    assert found.accuracy.error == pytest.approx(math.sqrt(2 / 9 / 2), rel=1e-6)
    nll = 0.0
    for text in texts:
        before, _, last = text.strip().rpartition(" ")
        logits, state = m.feed([0, *m.encode(before)])
        for token in m.encode(f" {last}"):
            nll -= log_softmax(logits)[token]
            logits, state = m.feed([token], state)
    assert found.perplexity.value == pytest.approx(math.exp(nll / 3), rel=1e-3)
    assert len(last_words([bundle("demo", quant="none")], texts, against=DEMO, limit=1)) == 2
    with pytest.raises(InputError, match="text 2 has no last word: 'alone'"):
        last_words([bundle("demo", quant="none")], ["a b", "alone"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("One.\r\n<|endoftext|>\r\nTwo ä.\n<|endoftext|>\n \n", ["One.", "Two ä."]),
        ("One.\n<|endoftext|>\nTwo.\n<|endoftext|>", ["One.", "Two."]),
        ("<|endoftext|>\nOne.\n<|endoftext|>\n<|endoftext|>\nTwo.\n", ["One.", "Two.\n"]),
        ("\ufeffOne.", ["One."]),
        ("One <|endoftext|> and\n <|endoftext|>", ["One <|endoftext|> and\n <|endoftext|>"]),
    ],
)
def test_documents_of_a_text(content, found, tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    assert documents(file) == found


def test_documents(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('\ufeff{"text": "One."}\n\n{"text": "Two.\u2028Three.", "more": 1}\n\n', "utf-8")
    assert documents(lines) == ["One.", "Two.\u2028Three."]
    assert [len(text.split()) for text in documents(STORIES)] == [358, 391]
    for content, message in (
        ("{}\n", r'a\.jsonl, line 1: expected a JSON object with a "text"'),
        ('{"text": "a"}\n[]\n', r'a\.jsonl, line 2: expected a JSON object with a "text"'),
        ('{"text": 3}', r'a\.jsonl, line 1: its "text" is no text'),
        ("", r"a\.jsonl holds no text"),
    ):
        lines.write_text(content)
        with pytest.raises(InputError, match=message):
            documents(lines)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text: invalid start byte at byte 0"):
        documents(tmp_path / "a.txt")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        documents(tmp_path / "none")


def test_models_that_cannot_be_compared(bundle, tmp_path, random_pth):
    demo, odd = bundle("demo", quant="none"), bundle("odd", quant="int4")
    with pytest.raises(BundleError, match="has no tokenizer: export with --tokenizer"):
        evaluate([demo, odd], ["text"])
    with pytest.raises(InputError, match="they cannot be compared"):
        evaluate([demo], ["text"], against=random_pth("odd"))
    with pytest.raises(InputError, match="the text is shorter than two tokens"):
        evaluate([demo], ["a"], window=5)
    for window in (1, "8", 2.5):
        with pytest.raises(InputError, match=f"a window of {window} tokens predicts nothing"):
            evaluate([demo], ["a b c"], window=window)
    for measure in (evaluate, last_words):
        for texts in ("hello", []):
            with pytest.raises(InputError, match="texts is a list of documents, at least one"):
                measure([demo], texts)
        for limit in (0, -1, 1.5):
            with pytest.raises(InputError, match=f"a limit of {limit} leaves nothing"):
                measure([demo], ["a b c"], limit=limit)
        with pytest.raises(InputError, match="there is no bundle to evaluate"):
            measure([], ["a b c"])


def test_models_of_other_sizes_cannot_be_compared(bundle, tmp_path, weights):
    """One tokenizer, and a table that was padded."""
    _, w = weights("demo")
    padded = dict(w)
    for name in ("emb.weight", "head.weight"):
        padded[name] = np.concatenate([w[name], w[name][:64]])
    stored = {n: (x.T if n.split(".")[-1] in rwkv7.INPUTS_FIRST else x) for n, x in padded.items()}
    export(factory.write_pth(tmp_path / "p.pth", stored), tmp_path / "p", tokenizer=DEMO.with_name("tokenizer.json"))
    with pytest.raises(InputError, match=r"p has a vocabulary of 4160, .* one of 4096: they cannot be compared"):
        evaluate([bundle("demo", quant="int4"), tmp_path / "p"], ["text and text"])


def test_names_that_are_the_same_are_told_apart(bundle, tmp_path, monkeypatch):
    path = bundle("demo", quant="int4")
    found = evaluate([path, path], ["some text"])
    assert [s.name for s in found.scores] == [str(path), str(path)]
    monkeypatch.chdir(path)
    assert evaluate(["."], ["some text"]).scores[0].name == path.name


def test_a_last_word_may_stand_on_a_line_of_its_own(bundle):
    texts = ["It was the\nend.\n", "It was the\nend.", "It was the end."]
    one, two, other = (last_words([bundle("demo", quant="none")], [t])[0] for t in texts)
    assert one == two != other  # the line's end is the word's, as a space would be


# --- the command ---


def run(*args):
    return CliRunner().invoke(cli, ["eval", *map(str, args)])


def test_the_table(bundle):
    found = run(bundle("demo", quant="none"), bundle("demo", quant="int4"), "--limit", 1)
    assert found.exit_code == 0, found.output
    assert found.stderr == ""
    lines = found.stdout.splitlines()
    assert lines[0] == f"462 predictions, {len(documents(STORIES)[0]):,} bytes of text, 1 passage"
    assert lines[2].split() == ["perplexity", "bits/byte", "cost", "KL", "same", "top"]
    first, second = lines[3].split(), lines[4].split()
    assert first[0] == "demo-quant=none"
    assert len(first) == 7
    assert second[0] == "demo-quant=int4"
    assert (
        lines[8]
        == "Beside demo-quant=none: cost, in perplexity; KL, nats a token; same top, how often the likeliest token agrees."
    )
    scores = json.loads(run(bundle("demo", quant="none"), bundle("demo", quant="int4"), "--limit", 1, "--json").stdout)[
        "scores"
    ]
    assert f"{scores[0]['perplexity']['value']:.3f}" == first[1]
    assert f"{scores[1]['kl']['value']:.5f}" in second


def test_one_bundle_alone_and_last_words(bundle, tmp_path):
    alone = run(bundle("demo", quant="none"), "--window", 64, "--limit", 3)
    assert len(alone.stdout.splitlines()) == 4
    file = tmp_path / "l.jsonl"
    file.write_text('{"text": "Once upon a time"}\n{"text": "The dog ran away"}\n')
    words = run(bundle("demo", quant="int4"), "--text", file, "--last-words")
    assert words.stdout.startswith("the last words of 2 documents\n\n")
    assert len(json.loads(run(bundle("demo", quant="int4"), "--text", file, "--last-words", "--json").stdout)) == 1
    for args in (["--window", 64, "--text", file], []):
        wrong = run(bundle("demo", quant="int4"), "--last-words", *args)
        assert wrong.exit_code == 2
        assert "--last-words needs a --text of many short documents" in wrong.stderr
    assert (
        run(bundle("demo", quant="int4"), "--text", tmp_path / "none").stderr
        == f"Error: {tmp_path / 'none'} cannot be read: No such file or directory\n"
    )
    assert run().exit_code == 2
