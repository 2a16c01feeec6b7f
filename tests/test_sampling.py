"""From logits to tokens, on distributions made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_edge.errors import BackendError, InputError
from rwkv_edge.runtime.sampling import Sampling, log_softmax, sample, top_p

P = np.array([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.01, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.9, [1, 3, 2]), (0.95, [1, 3, 2, 0]), (1.0, [1, 3, 2, 0])],
)
def test_top_p_keeps_the_fewest_that_reach_it(threshold, kept):
    assert top_p(P, threshold).tolist() == kept


@given(st.integers(0, 10**6), st.floats(0.001, 1.0), st.sampled_from([3, 511, 513, 3000]))
def test_top_p_is_the_same_by_sorting_everything(seed, threshold, n):
    p = np.random.default_rng(seed).dirichlet(np.full(n, 0.1))
    kept = top_p(p, threshold)
    order = np.argsort(-p, kind="stable")
    np.testing.assert_array_equal(kept, order[: len(kept)])
    assert p[kept].sum() >= threshold * (1 - 1e-9)
    assert p[kept[:-1]].sum() < threshold


def test_sampling_follows_the_distribution():
    rng, n = np.random.default_rng(0), 20000
    logits = np.log(P).astype(np.float32)
    counts = np.bincount([sample(logits, Sampling(), rng) for _ in range(n)], minlength=4) / n
    np.testing.assert_allclose(counts, P, atol=0.015)
    counts = np.bincount([sample(logits, Sampling(top_p=0.7), rng) for _ in range(n)], minlength=4) / n
    np.testing.assert_allclose(counts, [0, 4 / 7, 0, 3 / 7], atol=0.015)
    counts = np.bincount([sample(logits, Sampling(temperature=0.5), rng) for _ in range(n)], minlength=4) / n
    np.testing.assert_allclose(counts, P**2 / (P**2).sum(), atol=0.015)


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert sample(np.array([1, 3, 3], np.float32), Sampling(temperature=0), np.random.default_rng(0)) == 1


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
def test_a_tiny_temperature_takes_the_most_likely(temperature):
    logits = np.random.default_rng(5).standard_normal(3000).astype(np.float32)
    for top in (1.0, 0.5):
        assert sample(logits, Sampling(temperature, top), np.random.default_rng(0)) == logits.argmax()


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
        ({"seed": -1}, "seed -1 is not possible"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Sampling(**settings)
