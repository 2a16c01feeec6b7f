"""That bench measures what it says; how fast things are is no test's affair."""

import json
import time

import pytest
from click.testing import CliRunner

from rwkv_edge import bench as b
from rwkv_edge.cli import cli
from rwkv_edge.errors import BackendError, BundleError, InputError


def test_a_bundle_is_measured_in_a_process_of_its_own(bundle):
    path = bundle("demo", quant="int4")
    found = b.bench(path, threads=1, n_prefill=40, n_decode=8, repetitions=3)
    assert (found.name, found.n_threads, found.n_prefill, found.n_decode) == (path.name, 1, 40, 8)
    assert found.nbytes == sum(f.stat().st_size for f in path.iterdir())
    assert found.bits_per_weight == pytest.approx(5.94, abs=0.01)
    assert len(found.prefill.tok_s) == len(found.decode.tok_s) == 3
    weights = 8 * found.gb_s * 1e9 / found.decode.median
    assert weights == pytest.approx(
        5.94 * 7.32e6 - 9 * 4096 * 256, rel=0.01
    )  # the embedding, in 8 bits and scales, is not read
    assert found.first_token_s > found.load_s > 0
    assert 2e7 < found.anonymous_bytes < found.peak_bytes < 4e8


def test_every_core_is_counted(bundle):
    import os

    found = b.bench(bundle("demo", quant="int4"), n_prefill=8, n_decode=2, repetitions=1)
    assert 1 <= found.n_threads <= os.cpu_count()


def test_disturbed_repetitions_are_made_again_and_counted(monkeypatch):
    """A process that sleeps has not had the processor."""
    calls = []

    def work():
        calls.append(None)
        if len(calls) in (1, 3):
            time.sleep(0.1)
        else:
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass

    monkeypatch.setattr(b, "MIN_SHARE", 0.3)  # this machine may be busy
    speed = b._repeat(work, 10, 3, 1)
    assert speed.disturbed >= 2
    assert len(speed.tok_s) == 3
    assert len(calls) == 3 + speed.disturbed
    assert speed.share >= 0.3
    assert speed.median < 250
    calls.clear()
    asleep = b._repeat(lambda: time.sleep(0.01), 10, 2, 1)
    assert asleep.disturbed == 2 * b.PATIENCE
    assert asleep.share < 0.3


def test_what_cannot_be_measured(bundle, tmp_path, monkeypatch):
    with pytest.raises(BundleError, match="none is not there"):
        b.bench(tmp_path / "none")
    with pytest.raises(InputError, match="n_decode 0 is not possible: expected 1 or more"):
        b.bench(bundle("odd", quant="int4"), n_decode=0)
    with pytest.raises(BackendError, match="failed with exit code 1: threads 1000 is not possible"):
        b.bench(bundle("odd", quant="int4"), threads=1000)


def test_the_table(bundle):
    path = bundle("odd", quant="int4")
    args = ["bench", str(path), "--threads", "1", "--threads", "2", "--prefill", "16", "--decode", "4", "-r", "2"]
    found = CliRunner().invoke(cli, args)
    assert (found.exit_code, found.stderr) == (0, "")
    lines = found.stdout.splitlines()
    assert lines[0].split()[:6] == ["MB", "bits", "threads", "prefill", "16", "decode"]
    assert [line.split()[:4:3] for line in lines[1:3]] == [[path.name, "1"], [path.name, "2"]]
    assert lines[1].split()[-1].count("+") == 1
    rows = json.loads(CliRunner().invoke(cli, [*args, "--json"]).stdout)
    assert [row["n_threads"] for row in rows] == [1, 2]
    assert all(len(row["decode"]["tok_s"]) == 2 for row in rows)
