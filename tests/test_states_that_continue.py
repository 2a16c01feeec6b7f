"""A text that continues from a state, in memory or from a file, is the text that was never stopped."""

import copy
import hashlib
import json
import pickle

import numpy as np
import pytest
from conftest import DEMO
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rwkv_edge import Chat, export, open_bundle
from rwkv_edge.errors import StateError

STORY = "Once upon a time there was a little dog. "
PENALTIES = {"temperature": 0, "presence_penalty": 2.0, "frequency_penalty": 3.0, "penalty_decay": 0.9}


@pytest.fixture
def exact(model):
    return model("demo", quant="none")


@pytest.fixture(scope="module")
def metaspace(workspace):
    """The demo model with a tokenizer in the style of SentencePiece: a word's space is in its token."""
    words = ["</s>", "<unk>", "▁Hello", "▁you", "▁there", *(f"▁{i}" for i in range(4091))]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    file = workspace / "metaspace.json"
    t.save(str(file))
    export(DEMO, workspace / "metaspace", quant="none", tokenizer=file)
    return open_bundle(workspace / "metaspace")


def forced(ids):
    """A callback by which the model says these ids."""
    left = iter(ids)

    def choose(logits, given):
        return np.where(np.arange(len(logits)) == next(left), 0, -np.inf)

    return choose


def through(how, model, state, folder):
    if how == "memory":
        return state
    if how == "pickle":
        return pickle.loads(pickle.dumps(copy.deepcopy(state)))
    state.save(folder / "s", half=how == "half")
    return model.load_state(folder / "s")


WAYS = pytest.mark.parametrize("how", ["memory", "pickle", "file", "half"])


@WAYS
@pytest.mark.parametrize("name", ["demo", "world"])
def test_a_character_that_was_cut_is_finished(name, how, model, tmp_path):
    """The owl is F0 9F A6 89: of several tokens in both vocabularies."""
    m = model(name, quant="none")
    ids = m.encode("a🦉b")
    assert len(ids) > 3
    pieces = [t.text for t in m.generate("Hi", max_tokens=len(ids), logits=forced(ids))]
    assert "".join(pieces) == "a🦉b"
    for n in range(len(ids) + 1):
        g = m.generate("Hi", max_tokens=len(ids), logits=forced(ids))
        for _ in range(n):
            next(g)
        state = through(how, m, g.state, tmp_path)
        rest = m.generate("", state, max_tokens=len(ids) - n, logits=forced(ids[n:]))
        assert [t.text for t in rest] == pieces[n:]
    # by feed, and by a prompt on top of a state
    _, state = m.feed(ids[:2])
    state = through(how, m, state, tmp_path)
    _, further = m.feed(ids[2:3], state)
    assert "".join(t.text for t in m.generate(ids[2:3], state, max_tokens=len(ids) - 3, logits=forced(ids[3:]))) == "🦉b"
    assert "".join(t.text for t in m.generate("", further, max_tokens=len(ids) - 3, logits=forced(ids[3:]))) == "🦉b"


@WAYS
def test_the_first_space_of_a_metaspace_tokenizer_is_kept(how, metaspace, tmp_path):
    hello, you, there = 2, 3, 4
    g = metaspace.generate("Hello", max_tokens=1, logits=forced([you]))
    assert [t.text for t in g] == [" you"]
    state = through(how, metaspace, g.state, tmp_path)
    assert [t.text for t in metaspace.generate("", state, max_tokens=1, logits=forced([there]))] == [" there"]
    _, state = metaspace.feed([hello])
    assert [t.text for t in metaspace.generate([you], state, max_tokens=1, logits=forced([there]))] == [" there"]


def test_a_text_that_begins_has_no_space(metaspace):
    g = metaspace.generate("", max_tokens=2, logits=forced([2, 3]))
    assert [t.text for t in g] == ["Hello", " you"]


def penalized(model, logits, state, n, counts=None):
    """Tokens by the definition of the penalties, in float64: and the counts then."""
    counts, ids = dict(counts or {}), []
    for _ in range(n):
        changed = logits.astype(np.float64)
        for i, count in counts.items():
            changed[i] -= 2.0 + 3.0 * count
        ids.append(int(changed.argmax()))
        counts = {i: 0.9 * count for i, count in counts.items()}
        counts[ids[-1]] = counts.get(ids[-1], 0) + (model.decode(ids[-1:]) not in " \t0123456789")
        logits, state = model.feed(ids[-1:], state)
    return ids, counts


@WAYS
def test_penalties_go_on_counting(how, exact, tmp_path):
    whole, _ = penalized(exact, *exact.feed(exact.encode(STORY)), 24)
    plain = [t.id for t in exact.generate(STORY, temperature=0, max_tokens=24)]
    assert len({*whole}) > len({*plain})  # there was something to penalize
    for n in (1, 5, 12):
        g = exact.generate(STORY, max_tokens=n, **PENALTIES)
        assert [t.id for t in g] == whole[:n]
        state = through(how, exact, g.state, tmp_path)
        rest = exact.generate("", state, max_tokens=24 - n, **PENALTIES)
        assert [t.id for t in rest] == whole[n:]
    # a state that has read on has not generated more
    g = exact.generate(STORY, max_tokens=12, **PENALTIES)
    _, counts = penalized(exact, *exact.feed(exact.encode(STORY)), len(list(g)))
    read = exact.encode(" And then")
    logits, state = exact.feed(read, through(how, exact, g.state, tmp_path))
    expected, _ = penalized(exact, logits, state, 6, counts)
    assert [t.id for t in exact.generate("", state, max_tokens=6, **PENALTIES)] == expected
    assert [t.id for t in exact.generate(read, g.state, max_tokens=6, **PENALTIES)] == expected


def test_what_is_generated_without_penalties_counts_once_they_were_on(exact):
    ids = exact.encode(STORY)
    g = exact.generate(STORY, max_tokens=5, **PENALTIES)
    said = [t.id for t in g]
    between = exact.generate("", g.state, max_tokens=4, temperature=0, penalty_decay=0.9)
    said += [t.id for t in between]
    counts = {}
    for i in said:
        counts = {token: 0.9 * count for token, count in counts.items()}
        counts[i] = counts.get(i, 0) + (exact.decode([i]) not in " \t0123456789")
    expected, _ = penalized(exact, *exact.feed([*ids, *said]), 5, counts)
    assert [t.id for t in exact.generate("", between.state, max_tokens=5, **PENALTIES)] == expected


@pytest.mark.parametrize(
    ("words", "stop", "kept"), [(" a dog END", "END", " a dog "), ("a 日本語 t", "語 t", "a 日本"), ("ab!b!c", "b!c", "ab!")]
)
def test_a_stop_that_is_not_in_the_state_is_not_counted(words, stop, kept, exact):
    """Penalties see what the state has: the text before the stop."""
    ids = exact.encode(words)
    g = exact.generate("Once", stop=[stop], max_tokens=len(ids), logits=forced(ids), **PENALTIES)
    assert "".join(t.text for t in g) == kept
    assert g.finish == "stop"
    counts, said = {}, exact.encode(kept)
    for i in said:
        counts = {token: 0.9 * count for token, count in counts.items()}
        counts[i] = counts.get(i, 0) + (exact.decode([i]) not in " \t0123456789")
    expected, _ = penalized(exact, *exact.feed([*exact.encode("Once"), *said]), 20, counts)
    assert [t.id for t in exact.generate("", g.state, max_tokens=20, **PENALTIES)] == expected


def test_chat_goes_on_from_a_file_as_if_never_stopped(model, tmp_path):
    m = model("demo", quant="none", template="rwkv")
    chat = Chat(m, max_tokens=8, **PENALTIES)
    "".join(chat.say("Hello"))
    chat.save(tmp_path / "s")
    assert m.load_state(tmp_path / "s").occurrences.keys() == chat.state.occurrences.keys()
    rest = "".join(chat.say("And then?"))
    later = Chat(m, max_tokens=8, **PENALTIES)
    later.load(tmp_path / "s")
    assert "".join(later.say("And then?")) == rest


def test_penalties_count_within_a_reply(model):
    """As in BlinkDL's chat: the second reply is not kept from the words of the first."""
    m = model("demo", quant="none", template="rwkv")
    chat = Chat(m, max_tokens=8, **PENALTIES)
    "".join(chat.say("Hello"))
    logits, state = m.feed(m.encode("\n\nUser: Hello\n\nAssistant:"), chat.state)
    "".join(chat.say("Hello"))
    ids, counts = penalized(m, logits, state, 8)
    assert chat.state.n_tokens == state.n_tokens + 8
    assert chat.state.recent == tuple(ids)
    assert chat.state.occurrences == pytest.approx(counts, rel=1e-5)


# --- the file ---


def test_what_a_file_has_besides_its_tensors(exact, bundle, tmp_path):
    g = exact.generate(STORY, max_tokens=12, **PENALTIES)
    said = [t.id for t in g]
    g.state.save(tmp_path / "s", half=True)
    found = load_file(tmp_path / "s")
    of = hashlib.sha256((bundle("demo", quant="none") / "tokenizer.json").read_bytes()).digest()
    assert found["recent.ids"].dtype == found["occurrences.ids"].dtype == np.int32
    assert found["occurrences.counts"].dtype == np.float32
    assert found["recent.ids"].tolist() == said[-8:]
    assert found["recent.tokenizer"].tobytes() == of
    _, counts = penalized(exact, *exact.feed(exact.encode(STORY)), 12)
    assert found["occurrences.ids"].tolist() == sorted(counts)
    np.testing.assert_allclose(found["occurrences.counts"], [counts[i] for i in sorted(counts)], rtol=1e-5)
    exact.feed([5, 6])[1].save(tmp_path / "short")  # no penalties: no occurrences
    short = load_file(tmp_path / "short")
    assert short["recent.ids"].tolist() == [5, 6]
    assert not any(name.startswith("occurrences") for name in short)


def test_without_a_tokenizer_a_file_has_no_ids(model, tmp_path):
    m = model("odd", quant="none")
    g = m.generate([1, 2], max_tokens=3, seed=1, presence_penalty=1.0)
    assert len(list(g)) == 3
    g.state.save(tmp_path / "s")
    assert {n for n in load_file(tmp_path / "s") if "." in n and not n[0].isdecimal()} == {
        "occurrences.ids",
        "occurrences.counts",
    }
    assert m.load_state(tmp_path / "s").n_tokens == 5


def rewrite(path, target, change):
    """A state file with other tensors, sealed as docs/bundle.md says."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as f:
        about = json.loads(f.metadata()["rwkv-edge state"])
    tensors = load_file(path)
    change(tensors)
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].tobytes())
    save_file(tensors, target, metadata={"rwkv-edge state": json.dumps(about | {"sha256": h.hexdigest()})})


def test_a_file_of_another_tokenizer_gives_the_state_and_not_the_ids(exact, metaspace, tmp_path):
    """One model, two tokenizers: what half a character is to one is a word to the other."""
    ids = exact.encode("🦉")
    exact.feed(ids[:-1])[1].save(tmp_path / "s")
    state = metaspace.load_state(tmp_path / "s")
    assert [t.text for t in metaspace.generate([2], state, max_tokens=1, logits=forced([3]))] == [" you"]
    assert [t.text for t in metaspace.generate("", state, max_tokens=1, logits=forced([3]))] == ["you"]
    g = metaspace.generate("", state, max_tokens=1, logits=forced([3]))
    next(g)
    assert g.state.recent == (3,)


def test_a_file_from_before_has_neither(exact, tmp_path):
    g = exact.generate(STORY, max_tokens=6, **PENALTIES)
    list(g)
    g.state.save(tmp_path / "s")

    def forget(tensors):
        for name in ("recent.ids", "recent.tokenizer", "occurrences.ids", "occurrences.counts"):
            del tensors[name]

    rewrite(tmp_path / "s", tmp_path / "old", forget)
    old = exact.load_state(tmp_path / "old")
    assert (old.recent, old.tokenizer, old.occurrences) == ((), None, None)
    np.testing.assert_array_equal(exact.feed([5], old)[0], exact.feed([5], g.state)[0])


def _set(name, value):
    def change(tensors):
        tensors[name] = np.asarray(value, tensors[name].dtype if name in tensors else np.int32)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("recent.ids", [4096]),
        _set("recent.ids", [-1]),
        _set("recent.ids", []),
        _set("recent.ids", range(9)),
        _set("recent.ids", [[1]]),
        _set("recent.tokenizer", [1] * 31),
        lambda t: t.update({"recent.ids": t["recent.ids"].astype(np.int64)}),
        lambda t: t.pop("recent.ids"),
        lambda t: t.pop("recent.tokenizer"),
        lambda t: t.pop("occurrences.ids"),
        lambda t: t.pop("occurrences.counts"),
        lambda t: t.update({"occurrences.ids": t["occurrences.ids"][::-1].copy()}),
        lambda t: t.update({"occurrences.ids": t["occurrences.ids"] + 4000}),
        lambda t: t.update({"occurrences.counts": t["occurrences.counts"][1:]}),
        lambda t: t.update({"occurrences.counts": t["occurrences.counts"] * np.float32(np.nan)}),
        lambda t: t.update({"occurrences.counts": -1 - t["occurrences.counts"]}),
        _set("recent.more", [1]),
    ],
)
def test_parts_of_a_file_that_cannot_be_are_refused(change, exact, tmp_path):
    g = exact.generate(STORY, max_tokens=6, **PENALTIES)
    list(g)
    g.state.save(tmp_path / "s")
    rewrite(tmp_path / "s", tmp_path / "same", lambda tensors: None)
    assert exact.load_state(tmp_path / "same").recent == g.state.recent
    rewrite(tmp_path / "s", tmp_path / "bad", change)
    with pytest.raises(StateError, match="bad is damaged"):
        exact.load_state(tmp_path / "bad")


def test_what_a_state_knows_of_its_text_does_not_change(exact):
    g = exact.generate(STORY, max_tokens=6, **PENALTIES)
    list(g)
    state = g.state
    with pytest.raises(TypeError):
        state.occurrences[5] = 1.0
    with pytest.raises(AttributeError):
        state.recent = ()
    before = dict(state.occurrences)
    list(exact.generate("", state, max_tokens=6, **PENALTIES))
    assert dict(state.occurrences) == before
