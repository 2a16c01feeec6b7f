"""From logits to tokens, on distributions made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_edge.errors import BackendError, InputError
from rwkv_edge.runtime.sampling import (
    Occurrences,
    Sampling,
    Settings,
    adjust,
    candidates,
    changed,
    log_normalizer,
    log_softmax,
    min_p,
    most_likely,
    penalize,
    sample,
    top_p,
    typical,
)

P = np.array([0.1, 0.4, 0.2, 0.3])
SORTED = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(("threshold", "n"), [(0.01, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.9, 3), (0.95, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(threshold, n):
    assert top_p(SORTED, threshold) == n


@pytest.mark.parametrize(("share", "n"), [(0.0, 4), (0.25, 4), (0.26, 3), (0.5, 3), (0.75, 2), (0.76, 1), (1.0, 1)])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(share, n):
    assert min_p(SORTED, share) == n


def test_typical_keeps_the_least_surprising_surprises():
    # Surprises are ln 2, 2 ln 2, 3 ln 2, 3 ln 2 and expected 1.75 ln 2: the second is nearest, then the first.
    p = np.array([0.5, 0.25, 0.125, 0.125])
    assert typical(p, 0.25).tolist() == [1]
    assert typical(p, 0.26).tolist() == [0, 1]
    assert typical(p, 0.76).tolist() == [0, 1, 2]
    assert typical(p, 1.0).tolist() == [0, 1, 2, 3]
    assert typical(np.array([1.0, 0.0]), 0.9).tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 2]),
        ({"top_k": 99}, [1, 3, 2, 0]),
        ({"top_p": 0.7}, [1, 3]),
        ({"min_p": 0.49}, [1, 3, 2]),
        ({"top_k": 3, "top_p": 0.7, "min_p": 0.3}, [1, 3]),
        ({"top_k": 1, "top_p": 0.9, "min_p": 0.3}, [1]),
        ({"typical_p": 0.3}, [3]),
        ({"top_k": 2, "typical_p": 0.5}, [1]),
    ],
)
def test_what_filters_leave(settings, kept):
    ids, log_p = candidates(np.log(P).astype(np.float32), Sampling(**settings))
    assert ids.tolist() == kept
    np.testing.assert_allclose(log_p, np.log(P)[kept], atol=1e-6)


def test_tokens_of_no_probability_are_never_left():
    p = np.array([0.5, 0.0, 0.5])
    with np.errstate(divide="ignore"):
        logits = np.log(p).astype(np.float32)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.9999}, {"min_p": 0.01}, {"typical_p": 0.99}):
        assert 1 not in candidates(logits, Sampling(**settings))[0]


@given(
    st.integers(0, 10**6),
    st.fixed_dictionaries(
        {},
        optional={
            "top_p": st.floats(0.001, 1.0),
            "top_k": st.integers(0, 1500),
            "min_p": st.floats(0, 1),
        },
    ),
    st.sampled_from([3, 1023, 1024, 3000]),
)
def test_filters_are_the_same_by_sorting_everything(seed, settings, n):
    s = Sampling(**settings)
    logits = np.round(4 * np.random.default_rng(seed).standard_normal(n), 1).astype(np.float32)  # many are equal
    kept, _ = candidates(logits, s)
    order = np.argsort(-logits, kind="stable")
    p = np.exp(log_softmax(logits))[order]
    counts = [n, s.top_k or n, int((p >= s.min_p * p[0] * (1 - 1e-9)).sum())]
    if s.top_p < 1:
        counts.append(int((p.cumsum() < s.top_p * (1 - 1e-9)).sum()) + 1)
    np.testing.assert_array_equal(kept if len(kept) < n else np.sort(kept), order[: min(counts)] if len(kept) < n else range(n))
    assert len(kept) == min(counts)


@given(st.integers(0, 10**6), st.sampled_from([1, 5, 60, 5000]), st.sampled_from([5, 1023, 1024, 3000, 65536]))
def test_most_likely_are_the_first_of_all_sorted(seed, n, n_vocab):
    logits = np.round(np.random.default_rng(seed).standard_normal(n_vocab), 2).astype(np.float32)
    likely = most_likely(logits, n)
    assert len(likely) >= min(n, n_vocab)
    np.testing.assert_array_equal(likely, np.argsort(-logits, kind="stable")[: len(likely)])


def test_log_normalizer():
    logits = (3 * np.random.default_rng(0).standard_normal(65536)).astype(np.float32)
    np.testing.assert_allclose(logits - log_normalizer(logits), log_softmax(logits), atol=3e-6)


def test_sampling_follows_the_distribution():
    rng, n = np.random.default_rng(0), 20000
    logits = np.log(P).astype(np.float32)
    for settings, expected in (
        ({}, P),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 0.5, "top_p": 0.69}, [0, 16 / 25, 0, 9 / 25]),  # the temperature comes last
        ({"temperature": 2, "top_p": 0.39}, [0, 1, 0, 0]),
    ):
        counts = np.bincount([sample(logits, Sampling(**settings), rng) for _ in range(n)], minlength=4) / n
        np.testing.assert_allclose(counts, expected, atol=0.015)


def test_penalties():
    logits, said = np.zeros(4, np.float32), Occurrences(4)
    for token, text in ((1, "a"), (1, "a"), (2, "7"), (0, "b")):
        said.add(token, text, 0.5)
    assert said.counts.tolist() == [1, 0.125 + 0.25, 0, 0]  # digits are not counted
    assert said.seen.tolist() == [True, True, True, False]
    changed = penalize(logits, said, presence=2, frequency=8)
    assert changed.tolist() == [-10, -5, -2, 0]
    assert changed.dtype == np.float32
    assert logits.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "counted"), [(" ", 0), ("\t", 0), ("5", 0), ("789", 0), ("75", 1), ("\n", 1), ("  ", 1), ("a", 1), (None, 1)]
)
def test_what_the_frequency_counts(text, counted):
    said = Occurrences(1)
    said.add(0, text, 0.9)
    assert said.counts[0] == counted


def test_adjust():
    logits, none = np.zeros(4, np.float32), Occurrences(4)
    assert adjust(logits, Sampling(), none) is logits
    changed = adjust(logits, Sampling(ban=[2], bias={0: 1.5, 2: 5}), none)
    assert changed.tolist() == [1.5, 0, -np.inf, 0]
    assert logits.tolist() == [0, 0, 0, 0]


def test_numpy_s_whole_numbers_are_whole_numbers():
    s = Sampling(top_k=np.int64(3), ban=np.array([1, 2]), bias={np.int32(4): 1.0}, seed=np.uint8(7))
    assert (s.top_k, s.ban, dict(s.bias), s.seed) == (3, (1, 2), {4: 1.0}, 7)
    assert hash(s) == hash(Sampling(top_k=3, ban=(1, 2), bias={4: 1.0}, seed=7))


def test_settings_that_there_are_not():
    assert changed(Sampling(top_k=3), {"seed": 5}) == Sampling(top_k=3, seed=5)
    with pytest.raises(TypeError, match="there is no setting 'foo': expected one of temperature, top_k, "):
        changed(Sampling(), {"foo": 1})


def test_settings_are_sampling_s_fields():
    import dataclasses

    assert list(Settings.__annotations__) == [f.name for f in dataclasses.fields(Sampling)]


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert sample(np.array([1, 3, 3], np.float32), Sampling(temperature=0), np.random.default_rng(0)) == 1


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
def test_a_tiny_temperature_takes_the_most_likely(temperature):
    logits = np.random.default_rng(5).standard_normal(3000).astype(np.float32)
    for top in (1.0, 0.5):
        assert sample(logits, Sampling(temperature, top_p=top), np.random.default_rng(0)) == logits.argmax()


def test_a_huge_temperature_takes_any():
    logits, rng = np.array([0, -np.inf, 1e30], np.float32), np.random.default_rng(0)
    assert {sample(logits, Sampling(1e300), rng) for _ in range(50)} == {0, 2}


def test_a_seed_gives_the_same_tokens():
    logits = np.random.default_rng(5).standard_normal(1000).astype(np.float32)
    one, two, other = ([sample(logits, Sampling(), np.random.default_rng(s)) for _ in range(5)] for s in (1, 1, 2))
    assert one == two != other


def test_log_softmax_does_not_overflow():
    np.testing.assert_allclose(np.exp(log_softmax(np.array([1000.0, 1000.0], np.float32))), [0.5, 0.5])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_that_diverged_is_said_to(bad):
    with pytest.raises(BackendError, match="logits that are not finite"):
        sample(np.array([0, bad], np.float32), Sampling(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature -1 is not possible: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature nan is not possible"),
        ({"top_p": 0}, "top_p 0 is not possible: expected more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p 1.5 is not possible"),
        ({"seed": -1}, "seed -1 is not possible: expected a whole number, 0 or more"),
        ({"seed": 1.5}, "seed 1.5 is not possible"),
        ({"top_k": -1}, "top_k -1 is not possible: expected a whole number, 0 or more"),
        ({"top_k": None}, "top_k None is not possible"),
        ({"min_p": 1.1}, "min_p 1.1 is not possible: expected 0 to 1"),
        ({"typical_p": 0}, "typical_p 0 is not possible: expected more than 0, at most 1"),
        ({"penalty_decay": 2}, "penalty_decay 2 is not possible: expected 0 to 1"),
        ({"presence_penalty": float("inf")}, "presence_penalty inf is not possible: expected -10000 to 10000"),
        ({"frequency_penalty": "a"}, "frequency_penalty 'a' is not possible"),
        ({"ban": ["a"]}, "'a' is no token id: expected a whole number"),
        ({"ban": 5}, "ban is a list of token ids, and bias a mapping"),
        ({"bias": [1, 2]}, "ban is a list of token ids, and bias a mapping"),
        ({"temperature": 10**400}, "temperature 1000.* is not possible"),
        ({"ban": [-1]}, "-1 is no token id"),
        ({"bias": {3: float("nan")}}, "bias of token 3 nan is not possible: expected -10000 to 10000"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)
