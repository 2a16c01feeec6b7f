"""Feed, generate, state: what an app relies on."""

import gc
import threading
import tracemalloc

import numpy as np
import pytest
from conftest import apart

from rwkv_edge import State, open_bundle
from rwkv_edge.errors import BackendError, InputError, OutputError, StateError

STORY = "Once upon a time there was a little dog who lived in a house. "


@pytest.fixture
def demo(model):
    return model("demo", quant="int4")


@pytest.fixture
def exact(model):
    return model("demo", quant="none")


def test_feed_gives_the_last_logits_or_every_one(exact):
    ids = exact.encode(STORY)
    last, state = exact.feed(ids)
    every, same = exact.feed(ids, every=True)
    assert last.shape == (4096,)
    assert every.shape == (len(ids), 4096)
    assert last.dtype == every.dtype == np.float32
    np.testing.assert_array_equal(every[-1], last)
    assert state.n_tokens == same.n_tokens == len(ids)


def test_what_goes_in_is_not_changed_and_what_comes_out_is_fresh(exact):
    ids = exact.encode(STORY)
    _, state = exact.feed(ids)
    kept = {n: x.copy() for n, x in state.tensors.items()}
    one, after = exact.feed([5], state)
    mine = one.copy()
    two, again = exact.feed([5], state)
    np.testing.assert_array_equal(two, mine)
    one[:] = 0
    np.testing.assert_array_equal(two, mine)
    for n, x in state.tensors.items():
        np.testing.assert_array_equal(x, kept[n])
        np.testing.assert_array_equal(after.tensors[n], again.tensors[n])
    with pytest.raises(ValueError, match="read-only"):
        state.tensors["0.wkv"][:] = 0
    with pytest.raises(TypeError):
        state.tensors["0.wkv"] = None


@pytest.mark.parametrize("wkv", ["attention", "plain", "step"])
def test_chunks_do_not_matter_in_exact_arithmetic(wkv, model):
    m = model("demo", quant="none", wkv=wkv)
    ids = m.encode(STORY * 25)[:300]
    whole, end = m.feed(ids, every=True)
    for size in {"attention": (1, 3, 65, 255, 257), "plain": (1, 3, 63, 65), "step": (1, 100)}[wkv]:
        parts, state = [], None
        for i in range(0, len(ids), size):
            logits, state = m.feed(ids[i : i + size], state, every=True)
            parts.append(logits)
        assert apart(np.concatenate(parts), whole) <= 5e-5
        assert max(apart(x, end.tensors[n]) for n, x in state.tensors.items()) <= 3e-4


def test_generate_is_a_loop_over_feed(demo):
    prompt = demo.encode(STORY)
    tokens = list(demo.generate(prompt, max_tokens=40, temperature=0))
    logits, state = demo.feed(prompt)
    for token in tokens:
        assert token.id == logits.argmax()
        p = np.exp(logits.astype(np.float64) - logits.max())
        assert token.logprob == pytest.approx(np.log(p[token.id] / p.sum()), abs=1e-6)
        logits, state = demo.feed([token.id], state)
    assert "".join(t.text for t in tokens) == demo.tokenizer.decode([t.id for t in tokens])


def test_generate_gives_the_state_back(exact):
    """What was said so far, and what comes next, are as if never stopped."""
    whole = [t.id for t in exact.generate(STORY, max_tokens=30, temperature=0)]
    g = exact.generate(STORY, max_tokens=10, temperature=0)
    first = [t.id for t in g]
    state = g.state
    assert state.n_tokens == len(exact.encode(STORY)) + 10
    _, fed = exact.feed(first, exact.feed(exact.encode(STORY))[1])
    assert fed.n_tokens == state.n_tokens
    assert max(apart(state.tensors[n], fed.tensors[n]) for n in fed.tensors) <= 3e-4
    rest = list(exact.generate([whole[10]], state, max_tokens=19, temperature=0))
    assert first + [whole[10]] + [t.id for t in rest] == whole


def test_a_state_goes_on_without_another_token(exact, tmp_path):
    """What it would have said next: at once, from a file, and from a file of half the size."""
    whole = [t.id for t in exact.generate(STORY, max_tokens=20, temperature=0)]
    g = exact.generate(STORY, max_tokens=8, temperature=0)
    assert [t.id for t in g] == whole[:8]
    state = g.state
    state.save(tmp_path / "s")
    state.save(tmp_path / "half", half=True)
    for again in (state, exact.load_state(tmp_path / "s"), exact.load_state(tmp_path / "half")):
        for nothing in ("", []):
            rest = exact.generate(nothing, again, max_tokens=12, temperature=0)
            assert [t.id for t in rest] == whole[8:]
            assert rest.stats.n_prompt == 0
            assert rest.state.n_tokens == state.n_tokens + 12
    logits, fed = exact.feed(exact.encode(STORY))
    np.testing.assert_array_equal(fed.logits, logits)
    assert next(exact.generate("", fed, temperature=0)).id == whole[0]
    bare = State(fed.model_id, fed.n_tokens, fed.tensors)  # such as one that was trained
    with pytest.raises(InputError, match="there are no tokens to read: give at least one, or a state to go on from"):
        exact.generate("", bare)
    bare.save(tmp_path / "bare")
    assert exact.load_state(tmp_path / "bare").logits is None
    stopped = exact.generate("Once upon a time", stop=[" Lily"], max_tokens=50, temperature=0)
    said = "".join(t.text for t in stopped)
    other = exact.generate("", stopped.state, max_tokens=3, temperature=0)
    assert said + "".join(t.text for t in other) == ", there was a little girl named Lily. She"


def test_the_state_can_be_asked_for_at_any_moment(exact):
    g = exact.generate(STORY, max_tokens=5, temperature=0)
    n = len(exact.encode(STORY))
    assert g.state.n_tokens == n
    next(g)
    next(g)
    assert g.state.n_tokens == n + 2
    assert len(list(g)) == 3
    assert g.state.n_tokens == n + 5
    assert g.state.n_tokens == n + 5
    assert list(g) == []


def test_a_saved_state_goes_on_as_if_never_stopped(exact, tmp_path):
    ids = exact.encode(STORY)
    _, state = exact.feed(ids[:7])
    state.save(tmp_path / "story.state")
    loaded = exact.load_state(tmp_path / "story.state")
    assert loaded.n_tokens == 7
    np.testing.assert_array_equal(exact.feed(ids[7:], loaded)[0], exact.feed(ids[7:], state)[0])
    state.save(tmp_path / "half.state", half=True)
    assert (tmp_path / "half.state").stat().st_size < 0.6 * (tmp_path / "story.state").stat().st_size
    logits, _ = exact.feed(ids[7:], exact.load_state(tmp_path / "half.state"))
    assert apart(logits, exact.feed(ids[7:], state)[0]) < 0.01


def test_a_state_fits_every_bundle_of_its_model(model):
    one, other = model("demo", quant="none"), model("demo", quant="none", wkv="plain")
    ids = one.encode(STORY)
    _, state = one.feed(ids)
    assert apart(other.feed([5], state)[0], one.feed([5], state)[0]) <= 5e-5


def test_states_of_others_and_damaged_ones_are_refused(exact, model, tmp_path):
    _, state = exact.feed([1, 2])
    file = tmp_path / "s.state"
    state.save(file)
    stranger = model("odd", quant="none")
    with pytest.raises(StateError, match=r"s\.state belongs to another model"):
        stranger.load_state(file)
    with pytest.raises(StateError, match="the state belongs to another model"):
        stranger.feed([1], state)
    with pytest.raises(StateError, match="the state belongs to another model"):
        stranger.generate([1], state)
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(StateError, match="is damaged: its tensors are not the ones that were saved"):
        exact.load_state(file)
    for content in (data[:200], b"", b"hello"):
        file.write_bytes(content)
        with pytest.raises(StateError, match="is damaged or not a state file"):
            exact.load_state(file)
    with pytest.raises(StateError, match="does not exist"):
        exact.load_state(tmp_path / "none")
    with pytest.raises(OutputError, match="is not a folder: create it first"):
        state.save(tmp_path / "none" / "s.state")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "there are no tokens to read"),
        ([4096], "token 4096 is outside the vocabulary of 0 to 4095"),
        ([3, -1], "token -1 is outside the vocabulary"),
        ([2**70], "tokens are not a flat list of whole numbers"),
        ([1.5], "tokens are not a flat list of whole numbers"),
        ([True], "tokens are not a flat list of whole numbers"),
        ([[1, 2]], "tokens are not a flat list of whole numbers"),
        ([[1], [2, 3]], "tokens are not a flat list of whole numbers"),
        ("text", "this is text, and token ids are expected"),
    ],
)
def test_tokens_that_are_none(tokens, message, demo):
    with pytest.raises(InputError, match=message):
        demo.feed(tokens)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a", {"max_tokens": -1}, "max_tokens -1 is not possible"),
        ("a", {"temperature": -0.1}, "temperature -0.1 is not possible"),
        ("a", {"top_p": 2}, "top_p 2 is not possible"),
        ("a", {"stop": "end"}, "stop is a list of texts"),
        ("a", {"stop": [""]}, "stop is a list of texts, none of them empty"),
        ("a", {"stop": [3]}, "stop is a list of texts, none of them empty"),
        ("a", {"stop": None}, "stop is a list of texts, none of them empty"),
        ("a", {"max_tokens": 2.5}, "max_tokens 2.5 is not possible"),
        ("a", {"seed": 1.5}, "seed 1.5 is not possible"),
        ("a", {"temperature": "1"}, "temperature '1' is not possible"),
        ("\ud800", {}, "the tokenizer cannot encode this text"),
    ],
)
def test_generations_that_cannot_be(prompt, options, message, demo):
    with pytest.raises(InputError, match=message):
        demo.generate(prompt, **options)


def test_without_a_tokenizer_ids_do(model):
    m = model("odd", quant="int4")
    tokens = list(m.generate([1, 2, 3], max_tokens=5))
    assert len(tokens) == 5
    assert {t.text for t in tokens} == {""}
    with pytest.raises(InputError, match="has no tokenizer: give token ids"):
        m.generate("text")
    with pytest.raises(InputError, match="stop texts need a tokenizer"):
        m.generate([1], stop=["x"])


def test_a_seed_gives_the_same_text(demo):
    def text(**options):
        return "".join(t.text for t in demo.generate(STORY, max_tokens=30, **options))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(temperature=0) == text(temperature=0, seed=9)


@pytest.mark.parametrize("stop", [["dog"], [" a", "the"], [". "], ["never said"], ["upon", "y", "xx"]])
def test_stop_texts(stop, exact):
    whole = "".join(t.text for t in exact.generate("The little", max_tokens=60, temperature=0))
    g = list(exact.generate("The little", max_tokens=60, temperature=0, stop=stop))
    found = [whole.find(s) for s in stop if s in whole]
    expected = whole[: min(found)] if found else whole
    assert "".join(t.text for t in g) == expected
    if found:
        assert len(g) < 60


def test_an_interrupted_prompt_is_read_again(exact, monkeypatch):
    prompt = exact.encode(STORY * 60)[:600]
    expected = exact.feed(prompt)[1]
    g = exact.generate(prompt, max_tokens=3, temperature=0)
    run, calls = g._loop._run, []

    def interrupted(ids, every):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(ids, every)

    monkeypatch.setattr(g._loop, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(g)
    state = g.state
    assert state.n_tokens == 600
    for n, x in expected.tensors.items():
        np.testing.assert_array_equal(state.tensors[n], x)


def test_the_pair_that_feed_gives_is_not_a_state(exact):
    with pytest.raises(InputError, match="the state is a tuple: give the State that feed"):
        exact.feed([1], exact.feed([1]))


def test_a_state_is_saved_over_states_only(exact, tmp_path):
    _, state = exact.feed([1, 2])
    (tmp_path / "weights.pth").write_text("precious")
    with pytest.raises(OutputError, match=r"weights\.pth exists and is no state file"):
        state.save(tmp_path / "weights.pth")
    with pytest.raises(OutputError, match="is no regular file"):
        state.save(tmp_path)
    assert (tmp_path / "weights.pth").read_text() == "precious"
    state.save(tmp_path / "s")
    exact.feed([3], state)[1].save(tmp_path / "s")
    assert exact.load_state(tmp_path / "s").n_tokens == 3


def test_end_of_text_ends_the_generation(exact, monkeypatch):
    ids = [t.id for t in exact.generate(STORY, max_tokens=20, temperature=0)]
    monkeypatch.setattr(exact, "eos_token_ids", (ids[7],))
    first = ids.index(ids[7])
    g = exact.generate(STORY, max_tokens=20, temperature=0)
    assert [t.id for t in g] == ids[: first + 1]
    assert g.state.n_tokens == len(exact.encode(STORY)) + first


@pytest.mark.parametrize("stop", ["Lily", "named Lily", " little", "e was a", "girl named Lily. She"])
def test_a_stop_text_is_not_in_the_state(exact, stop):
    """However tokens cut it: going on is as if its beginning had not been said."""
    prompt = "Once upon a time"
    g = exact.generate(prompt, max_tokens=60, temperature=0, stop=[stop])
    said = "".join(t.text for t in g)
    assert g.finish == "stop"
    assert not said.endswith(stop)
    assert stop in ", there was a little girl named Lily. She loved to"
    clean, _ = exact.feed([1], exact.feed(exact.encode(prompt + said))[1])
    again, _ = exact.feed([1], g.state)
    assert g.state is g.state or g.state.n_tokens == len(exact.encode(prompt + said))
    assert apart(again, clean) <= 5e-5


@pytest.mark.parametrize("quant", ["none"])
@pytest.mark.parametrize(
    ("words", "stop"), [("aéx", "é"), ("a 日本語 t", "本"), ("a 日本語 t", "語 t"), ("b🎉c", "🎉c"), ("ab日本", "b日")]
)
def test_a_stop_that_begins_in_a_character_of_several_tokens(words, stop, quant, model):
    m = model("demo", quant=quant)
    ids = m.encode(words)

    def speak(logits, given):
        return np.where(np.arange(4096) == ids[len(given)], 0, -np.inf)

    g = m.generate("Once", stop=[stop], logits=speak, max_tokens=len(ids))
    said = "".join(t.text for t in g)
    assert said == words[: words.index(stop)]
    _, expected = m.feed(m.encode(said), m.feed(m.encode("Once"))[1]) if said else m.feed(m.encode("Once"))
    for name, x in expected.tensors.items():
        assert apart(g.state.tensors[name], x) < 0.05, name  # the tokens may be cut otherwise


def test_a_false_alarm_of_a_stop_changes_nothing(exact):
    plain = exact.generate("Once upon a time", max_tokens=12, temperature=0)
    watched = exact.generate("Once upon a time", max_tokens=12, temperature=0, stop=["little girl called", "was a big"])
    text = "".join(t.text for t in plain)
    assert "".join(t.text for t in watched) == text
    assert watched.finish == plain.finish == "length"
    np.testing.assert_array_equal(watched.state.tensors["0.wkv"], plain.state.tensors["0.wkv"])


def test_why_a_generation_ended(exact, monkeypatch):
    ids = [t.id for t in exact.generate(STORY, max_tokens=5, temperature=0)]
    for options, finish in (({"max_tokens": 3}, "length"), ({"max_tokens": 0}, "length")):
        g = exact.generate(STORY, temperature=0, **options)
        assert g.finish == (None if options["max_tokens"] else "length")
        list(g)
        assert g.finish == finish
    monkeypatch.setattr(exact, "eos_token_ids", (ids[2],))
    g = exact.generate(STORY, temperature=0)
    assert len(list(g)) == 3
    assert g.finish == "end"


def test_the_logits_callback_decides(demo):
    """A grammar of two words: what it forbids is never said, and it sees what was."""
    allowed = [demo.token(" dog"), demo.token(" cat")]
    seen = []

    def grammar(logits, ids):
        assert logits.shape == (4096,)
        seen.append(ids)
        masked = np.full_like(logits, -np.inf)
        masked[allowed[len(ids) % 2]] = 0
        logits[:] = 0  # its own copy
        return masked

    tokens = list(demo.generate(STORY, max_tokens=4, logits=grammar))
    assert [t.id for t in tokens] == [*allowed, *allowed]
    assert seen == [(), (allowed[0],), (*allowed,), (*allowed, allowed[0])]
    assert tokens[0].logprob == next(demo.generate(STORY, top_logprobs=4096)).top[0][1] or tokens[0].logprob < -1
    with pytest.raises(InputError, match=r"the logits callback gave shape \(3,\), expected \(4096,\)"):
        next(demo.generate(STORY, logits=lambda logits, ids: logits[:3]))
    with pytest.raises(InputError, match="leave no token to choose from"):
        next(demo.generate(STORY, logits=lambda logits, ids: logits - np.inf))
    for wrong in (np.nan, np.inf):
        with pytest.raises(InputError, match="the logits callback gave NaN or infinity"):
            next(demo.generate(STORY, logits=lambda logits, ids, wrong=wrong: logits + wrong))
    with pytest.raises(InputError, match="the logits callback failed, or gave no array of numbers"):
        next(demo.generate(STORY, logits=lambda logits, ids: "text"))
    with pytest.raises(InputError, match="logits is a int: expected a function"):
        demo.generate(STORY, logits=5)
    with pytest.raises(InputError, match="this is text, and token ids are expected"):
        demo.feed("text")


def test_a_state_can_be_pickled(exact):
    import copy
    import pickle

    _, state = exact.feed([1, 2, 3])
    for again in (pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        assert (again.model_id, again.n_tokens) == (state.model_id, 3)
        np.testing.assert_array_equal(exact.feed([4], again)[0], exact.feed([4], state)[0])


def test_bans_and_biases(demo):
    best = [i for i, _ in next(demo.generate(STORY, temperature=0, top_logprobs=3)).top]
    assert next(demo.generate(STORY, temperature=0, ban=best[:2])).id == best[2]
    assert next(demo.generate(STORY, temperature=0, bias={best[2]: 100.0})).id == best[2]
    assert next(demo.generate(STORY, temperature=0, bias={best[0]: -100.0})).id == best[1]
    with pytest.raises(InputError, match="leave no token to choose from"):
        next(demo.generate(STORY, ban=range(4096)))
    with pytest.raises(InputError, match="token 4096 is outside the vocabulary"):
        demo.generate(STORY, ban=[4096])


def test_text_and_back(demo, model):
    assert demo.decode(demo.encode(STORY)) == STORY
    assert demo.decode([]) == ""
    with pytest.raises(InputError, match="token 4096 is outside the vocabulary"):
        demo.decode([4096])
    with pytest.raises(InputError, match="has no tokenizer"):
        model("odd", quant="int4").decode([1])


def test_top_logprobs(demo):
    logits, _ = demo.feed(demo.encode(STORY))
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    token = next(demo.generate(STORY, top_logprobs=5))
    assert [i for i, _ in token.top] == np.argsort(-p)[:5].tolist()
    np.testing.assert_allclose([x for _, x in token.top], np.log(np.sort(p)[::-1][:5]), atol=1e-6)
    assert next(demo.generate(STORY)).top == ()


def test_penalties_end_a_repetition(exact):
    """What is taken from the logits is what the penalties say, token by token."""
    settings = {"temperature": 0, "presence_penalty": 2, "frequency_penalty": 3, "penalty_decay": 0.9}
    ids = exact.encode(STORY)
    counts, seen = np.zeros(4096), np.zeros(4096, bool)
    logits, state = exact.feed(ids)
    for token in exact.generate(STORY, max_tokens=40, **settings):
        assert token.id == (logits - 2 * seen - 3 * counts).argmax()
        counts *= 0.9
        seen[token.id] = True
        counts[token.id] += exact.tokenizer.decode([token.id]) not in " \t0123456789"
        logits, state = exact.feed([token.id], state)
    plain = [t.id for t in exact.generate(STORY, max_tokens=40, temperature=0)]
    assert plain != [t.id for t in exact.generate(STORY, max_tokens=40, **settings)]


def test_an_interrupt_anywhere_leaves_a_state_to_go_on_from(exact, monkeypatch):
    """Ctrl-C may come before or after onnxruntime's work: the state has read what was given, once."""
    expected = {}
    g = exact.generate(STORY, temperature=0, max_tokens=6)
    for n, _ in enumerate(g, 1):
        expected[n] = g.state
    from rwkv_edge.runtime.session import Loop

    go = Loop._go
    for after in (False, True):
        g = exact.generate(STORY, temperature=0, max_tokens=6)
        tokens = [next(g), next(g)]

        def interrupted(self, *args, after=after):
            if after:
                go(self, *args)
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(Loop, "_go", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(g)
        assert g.state.n_tokens == expected[2].n_tokens
        np.testing.assert_array_equal(g.state.tensors["5.wkv"], expected[2].tensors["5.wkv"])
        tokens.append(next(g))
        assert g.state.n_tokens == expected[3].n_tokens
        np.testing.assert_array_equal(g.state.tensors["5.wkv"], expected[3].tensors["5.wkv"])


def test_generations_do_not_disturb_each_other(demo, monkeypatch):
    monkeypatch.setattr(demo, "eos_token_ids", ())
    alone = [[t.id for t in demo.generate(STORY, max_tokens=25, seed=s)] for s in range(3)]
    together = [demo.generate(STORY, max_tokens=25, seed=s) for s in range(3)]
    rows = list(zip(*together, strict=True))
    assert [[t.id for t in column] for column in zip(*rows, strict=True)] == alone


def test_threads_share_a_model_and_a_state(demo):
    _, state = demo.feed(demo.encode(STORY))
    expected = demo.feed([7, 8, 9], state)[0]
    alone = [t.id for t in demo.generate([7], state, max_tokens=20, seed=3)]
    found = []

    def work():
        for _ in range(5):
            found.append(np.array_equal(demo.feed([7, 8, 9], state)[0], expected))
            found.append([t.id for t in demo.generate([7], state, max_tokens=20, seed=3)] == alone)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 40
    assert all(found)


def test_memory_is_flat_however_long_the_text(demo, monkeypatch):
    """A list that kept a number for every token would grow by 40 bytes a token. What grows here is Python's own store of
    small objects, which fills up: measured 8 kB over the first 1,000 tokens, 1 to 3 kB over the 3,000 after them."""
    monkeypatch.setattr(demo, "eos_token_ids", ())
    n = 3000
    g = demo.generate(STORY, max_tokens=1000 + n, seed=1)
    tracemalloc.start()
    for _ in range(1000):
        next(g)
    gc.collect()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(n):
        next(g)
    gc.collect()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 8 * n
    assert peak - before < 400_000  # a token's logits in float64 and what sampling makes of them


def test_backends_that_cannot_are_said_so(bundle, monkeypatch):
    import onnxruntime

    with pytest.raises(InputError, match="threads 0 is not possible"):
        open_bundle(bundle("odd", quant="int4"), threads=0)
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.0")
    with pytest.raises(BackendError, match=r"the bundle needs onnxruntime 1\.25\.1, this is 1\.25\.0: update it"):
        open_bundle(bundle("odd", quant="int4"))
