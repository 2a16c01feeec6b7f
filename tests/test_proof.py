"""check --against: a bundle's files hold the checkpoint's weights, and a planted fault fails by its tensor's name.

Files are sealed anew after each fault, so that the numbers alone betray it. What a byte means is written here once more, by
hand: this file shares no code with what packs or unpacks.
"""

import json

import factory
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DEMO

from rwkv_edge import export
from rwkv_edge.bundle import sha256_of
from rwkv_edge.cli import cli
from rwkv_edge.convert import quantize

KINDS = {
    "int4": {"quant": "int4"},
    "int8": {"quant": "int8"},
    "ane-lut4": {"target": "coreml", "quant": "lut4"},
    "ane-lut6": {"target": "coreml", "quant": "lut6"},
    "ane-int8": {"target": "coreml", "quant": "int8"},
    "gpu-int4": {"target": "coreml", "quant": "int4", "profile": "gpu"},
}


def run(*args):
    return CliRunner().invoke(cli, [str(a) for a in args])


def check(path, against=None, *more):
    return run("check", path, *(("--against", against) if against else ()), "-n", "2", *more)


def entries(path):
    """Every tensor's entry, or the first of several."""
    tensors = json.loads((path / "manifest.json").read_text())["tensors"]
    return {name: t[0] if isinstance(t, list) else t for name, t in tensors.items()}


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def reseal(path):
    """Let the manifest agree with the files."""

    def sums(manifest):
        for name, about in manifest["files"].items():
            about["sha256"] = sha256_of(path / name)

    edit(path, sums)


class Matrix:
    """A quantized tensor's bytes: any number of bits a code, the first code in the lowest bits of a row."""

    def __init__(self, path, entry):
        self.file, self.entry = path / entry["file"], entry
        self.n_out, self.n_in = entry["shape"]
        self.bits, block = entry["bits"], entry["block"]
        per_row = -(-self.n_in // block) * block if block else self.n_in  # a short last block is filled
        self.width = per_row * self.bits // 8
        self.data = bytearray(self.file.read_bytes())
        self.dtype = "<f2" if "factor" in entry else "<f4"

    def row(self, i):
        at = self.entry["offset"] + i * self.width
        return slice(at, at + self.width)

    def code(self, i, j):
        return int.from_bytes(self.data[self.row(i)], "little") >> (j * self.bits) & (2**self.bits - 1)

    def set_code(self, i, j, code):
        word = int.from_bytes(self.data[self.row(i)], "little") ^ ((self.code(i, j) ^ code) << (j * self.bits))
        self.data[self.row(i)] = word.to_bytes(self.width, "little")

    @property
    def second(self):
        """Scales or tables, a row each."""
        place = self.entry["scales"]
        x = np.frombuffer(bytes(self.data[place["offset"] : place["offset"] + place["bytes"]]), self.dtype)
        return x.reshape(self.n_out // (self.entry.get("rows") or 1), -1).copy()

    @second.setter
    def second(self, x):
        place = self.entry["scales"]
        self.data[place["offset"] : place["offset"] + place["bytes"]] = x.astype(self.dtype).tobytes()

    def write(self):
        assert self.file.read_bytes() != bytes(self.data)
        self.file.write_bytes(self.data)


def swap_codes(m):
    """Two codes of one byte, or where a byte holds one, of two."""
    i, j = next((i, j) for i in range(m.n_out) for j in range(0, m.n_in - 1, 2) if m.code(i, j) != m.code(i, j + 1))
    a, b = m.code(i, j), m.code(i, j + 1)
    m.set_code(i, j, b)
    m.set_code(i, j + 1, a)


def one_code_off(m):
    i, j = m.n_out // 2, m.n_in - 1
    m.set_code(i, j, m.code(i, j) + (1 if m.code(i, j) < 2 ** (m.bits - 1) else -1))


def swap_rows(m):
    """The last two, with their scales; of tables, codes alone."""
    a, b = m.row(m.n_out - 2), m.row(m.n_out - 1)
    m.data[a], m.data[b] = m.data[b], m.data[a]
    if not m.entry.get("rows"):
        second = m.second
        second[[-2, -1]] = second[[-1, -2]]
        m.second = second


def change_second(change):
    def plant(m):
        second = m.second
        change(second[len(second) // 2])
        m.second = second

    return plant


def swap_values(x):
    """The two neighbours in a table that are closest together, of those that differ."""
    gaps = np.diff(x)
    k = int(np.where(gaps > 0, gaps, np.inf).argmin())
    x[[k, k + 1]] = x[[k + 1, k]]


def shift_value(x):
    x[5] += 0.3 * (x[6] - x[5])


def times(factor):
    def change(x):
        x[-1] *= np.float32(factor)

    return change


FAULTS = {"two codes exchanged": swap_codes, "one code off by one": one_code_off, "two rows exchanged": swap_rows}
OF_TABLES = {
    "two values exchanged": change_second(swap_values),
    "a value moved": change_second(shift_value),
    "a value of the other sign": change_second(times(-1)),
}
OF_SCALES = {
    "a scale doubled": change_second(times(2)),
    "a scale of the other sign": change_second(times(-1)),
    "a scale a hundredth larger": change_second(times(1.01)),
}
PLANTED = [(kind, fault) for kind in KINDS for fault in (*FAULTS, *(OF_TABLES if "lut" in kind else OF_SCALES))]


def smallest(path, kind):
    """The smallest tensor that is quantized as the bundle's kind says."""
    bits = int(kind[-1])
    of_bits = {n: t for n, t in entries(path).items() if t["bits"] == bits and t["scales"]}
    fits = {n: t for n, t in of_bits.items() if bool(t.get("rows")) == ("lut" in kind)}
    return min(fits.items(), key=lambda item: item[1]["bytes"])


@pytest.mark.parametrize(("kind", "fault"), PLANTED)
def test_a_planted_fault_fails_by_its_tensor_s_name(kind, fault, copy, random_pth):
    path = copy(**KINDS[kind])
    name, entry = smallest(path, kind)
    matrix = Matrix(path, entry)
    (FAULTS | OF_TABLES | OF_SCALES)[fault](matrix)
    matrix.write()
    reseal(path)
    failed = check(path, random_pth("odd"))
    assert failed.exit_code == 3, failed.output
    tables = "lut" in kind
    a_row = 1 if tables else matrix.second.shape[1]
    n_wrong = 1 if fault != "two rows exchanged" or (tables and entry["rows"] > 1) else 2 * a_row
    assert f": {name}: {n_wrong} of {len(matrix.second) * a_row} " in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert "They are NOT the checkpoint's." in failed.stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_embedding_is_held_too(kind, fault, copy, random_pth):
    """Core ML's is stored times a power of two."""
    path = copy(**KINDS[kind])
    matrix = Matrix(path, entries(path)["emb.weight"])
    FAULTS[fault](matrix)
    matrix.write()
    reseal(path)
    failed = check(path, random_pth("odd"))
    assert (failed.exit_code, ": emb.weight: " in failed.stderr) == (3, True), failed.output


def test_a_factor_of_core_ml_is_held(copy, random_pth):
    """The manifest's factor of the embedding is twice what it should be."""
    path = copy(target="coreml", quant="fp16")
    edit(path, lambda m: m["tensors"]["emb.weight"][0].update(factor=m["tensors"]["emb.weight"][0]["factor"] * 2))
    failed = check(path, random_pth("odd"))
    assert (failed.exit_code, ": emb.weight: " in failed.stderr) == (3, True), failed.output


@pytest.mark.parametrize("options", [{"quant": "none"}, {"quant": "fp16"}, {"target": "coreml", "quant": "fp16"}])
@pytest.mark.parametrize("kind", ["vector", "low_rank", "embedding"])
def test_one_bit_of_a_float_is_seen(options, kind, copy, random_pth):
    path = copy(**options)
    name, entry = min(((n, t) for n, t in entries(path).items() if t["kind"] == kind), key=lambda item: item[1]["bytes"])
    file, last = path / entry["file"], entry["offset"] + entry["bytes"] - entry["bits"] // 8
    data = bytearray(file.read_bytes())
    data[last] ^= 1  # the lowest bit of the last number
    file.write_bytes(data)
    reseal(path)
    failed = check(path, random_pth("odd"))
    where = [n - 1 for n in entry["shape"]]
    reason = (
        f"1 of {np.prod(entry['shape'])} numbers are not the checkpoint's weights in float{entry['bits']}, the first at {where}"
    )
    assert failed.exit_code == 3, failed.output
    assert f": {name}: {reason}\n" in failed.stderr


def test_numbers_that_are_none_name_their_tensor(copy, random_pth):
    path = copy(quant="none")
    entry = entries(path)["blocks.1.att.x_k"]
    data = bytearray((path / entry["file"]).read_bytes())
    data[entry["offset"] : entry["offset"] + 4] = np.float32(np.nan).tobytes()
    (path / entry["file"]).write_bytes(data)
    reseal(path)
    failed = check(path, random_pth("odd"))
    assert failed.exit_code == 3, failed.output
    assert "blocks.1.att.x_k" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize("options", [{"quant": "int4"}, {"quant": "fp16"}, {"target": "coreml", "quant": "lut4"}])
def test_tables_outside_the_graph_are_held(options, copy, random_pth):
    path = copy("v7a", **options)
    assert check(path, random_pth("v7a")).exit_code == 0
    name = "blocks.1.ffn.s_emb.weight"
    entry = entries(path)[name]
    assert entry["file"] == "deep_embed.bin"
    data = bytearray((path / "deep_embed.bin").read_bytes())
    data[entry["offset"] + entry["bytes"] - 2] ^= 1
    (path / "deep_embed.bin").write_bytes(data)
    reseal(path)
    failed = check(path, random_pth("v7a"))
    assert (failed.exit_code, f": {name}: 1 of " in failed.stderr) == (3, True), failed.output


def test_a_merged_lora_is_held(tmp_path, random_pth):
    w = factory.weights(**factory.SHAPES["odd"])
    target = "blocks.1.att.key"
    n_out, n_in = w[f"{target}.weight"].shape
    lora = {f"{target}.lora_A": factory.uniform("a", (4, n_in)) / 8, f"{target}.lora_B": factory.uniform("b", (n_out, 4)) / 8}
    given = f"{factory.write_pth(tmp_path / 'lora.pth', lora, 'fp32')}:8"
    path = tmp_path / "merged"
    export(random_pth("odd"), path, quant="int4", lora=given)
    assert check(path, random_pth("odd"), "--lora", given).exit_code == 0
    matrix = Matrix(path, entries(path)[f"{target}.weight"])
    swap_codes(matrix)
    matrix.write()
    reseal(path)
    failed = check(path, random_pth("odd"), "--lora", given)
    assert (failed.exit_code, f": {target}.weight: 1 of " in failed.stderr) == (3, True), failed.output


def test_a_bundle_of_a_quantized_checkpoint_is_held_against_the_original(tmp_path, random_pth):
    quantize(random_pth("odd"), tmp_path / "q.safetensors", quant="int4")
    path = tmp_path / "out"
    export(tmp_path / "q.safetensors", path)
    assert check(path, random_pth("odd")).exit_code == 0
    assert "is quantized itself" in check(path, tmp_path / "q.safetensors").stderr
    name, entry = smallest(path, "int4")
    matrix = Matrix(path, entry)
    one_code_off(matrix)
    matrix.write()
    reseal(path)
    failed = check(path, random_pth("odd"))
    assert (failed.exit_code, f": {name}: 1 of " in failed.stderr) == (3, True), failed.output


def test_several_faults_are_counted(copy, random_pth):
    """Three numbers of two tensors: each tensor is named on stdout, the first of them in the error."""
    path = copy(quant="none")
    found = entries(path)
    data = bytearray((path / "weights.bin").read_bytes())
    for name, at in (("blocks.0.att.x_r", 0), ("blocks.0.att.x_r", 5), ("head.weight", 64 + 3)):
        data[found[name]["offset"] + 4 * at] ^= 1
    (path / "weights.bin").write_bytes(data)
    reseal(path)
    failed = check(path, random_pth("odd"))
    assert failed.exit_code == 3
    assert "blocks.0.att.x_r: 2 of 64 numbers" in failed.stderr
    assert failed.stderr.endswith("the first at [0]; and 1 other tensor\n")
    assert "WRONG  head.weight: 1 of 3904 numbers" in failed.stdout
    assert "the first at [1, 3]" in failed.stdout
    report = json.loads(check(path, random_pth("odd"), "--json").stdout)
    assert list(report["proof"]["faults"]) == ["blocks.0.att.x_r", "head.weight"]


# --- no false alarm ---


@pytest.mark.parametrize("options", [*KINDS.values(), {"quant": "none"}, {"quant": "fp16"}, {"quant": "int4", "block": 256}])
@pytest.mark.parametrize("name", ["odd", "v4", "v5.2", "v6", "v7a"])
def test_a_sound_bundle_holds_the_checkpoint_s_weights(name, options, bundle, random_pth):
    report = json.loads(check(bundle(name, **options), random_pth(name), "--json").stdout)["proof"]
    assert (report["compared"], report["faults"]) == (True, {})
    assert report["n_same"] == report["n_blocks"]
    assert bool(report["n_blocks"]) == (options["quant"] not in ("none", "fp16"))


def test_calibrated_tables_are_held_without_the_calibration(tmp_path, random_pth):
    path, text = tmp_path / "b", DEMO.with_name("stories.txt").read_text()[:2000]
    export(DEMO, path, target="coreml", quant="lut4", calibrate=text)
    assert entries(path)["blocks.0.att.key.weight"]["method"] == "weighted kmeans"
    assert check(path, DEMO).exit_code == 0
    name, entry = smallest(path, "ane-lut4")
    for fault in (swap_codes, one_code_off, swap_rows, OF_TABLES["two values exchanged"], OF_TABLES["a value moved"]):
        matrix = Matrix(path, entry)
        before = bytes(matrix.data)
        fault(matrix)
        matrix.write()
        reseal(path)
        failed = check(path, DEMO)
        assert (failed.exit_code, f": {name}: 1 of " in failed.stderr) == (3, True), failed.output
        (path / entry["file"]).write_bytes(before)


def test_a_scale_as_another_processor_rounds_it_is_no_fault(copy, random_pth):
    """Sums in float32 end in other bits there: the next number is as good a scale."""
    path = copy(quant="int4")
    matrix = Matrix(path, smallest(path, "int4")[1])
    second = matrix.second
    second[3, 0] = np.nextafter(second[3, 0], np.float32(np.inf))
    matrix.second = second
    matrix.write()
    reseal(path)
    passed = check(path, random_pth("odd"))
    assert passed.exit_code == 0, passed.output
    assert "The others are no worse: another processor rounds sums in another order.\n" in passed.stdout
    report = json.loads(check(path, random_pth("odd"), "--json").stdout)["proof"]
    assert (report["n_same"], report["faults"]) == (report["n_blocks"] - 1, {})


@pytest.mark.parametrize("kind", ["int4", "ane-lut4"])
def test_another_release_s_bundle_is_held_to_what_its_methods_declare(kind, copy, random_pth):
    """It is not quantized again: another release may have found other scales."""
    path = copy(**KINDS[kind])
    edit(path, lambda m: m["made_by"].update(version="0.0.1"))
    sound = json.loads(check(path, random_pth("odd"), "--json").stdout)["proof"]
    assert (sound["faults"], sound["n_blocks"]) == ({}, 0)
    name, entry = smallest(path, kind)
    matrix = Matrix(path, entry)
    one_code_off(matrix)
    matrix.write()
    reseal(path)
    failed = check(path, random_pth("odd"))
    assert (failed.exit_code, f": {name}: 1 of " in failed.stderr) == (3, True), failed.output


def test_what_is_not_proven_is_said(bundle, random_pth):
    path = bundle("odd", quant="int4")
    alone, both = check(path).stdout, check(path, random_pth("odd")).stdout
    assert "The bundle computes its own weights. Not compared with the checkpoint's: give --against.\n" in alone
    assert "The bundle computes its own weights. They are the checkpoint's.\n" in both
    n_tensors = len(entries(path))
    assert f"Tensors that are the checkpoint's, as their methods declare: {n_tensors} of {n_tensors}.\n" in both


# --- packing and unpacking, mirrored ---


def test_nibbles_that_are_packed_and_unpacked_wrongly_are_seen(tmp_path, monkeypatch, random_pth):
    """Whoever packs and whoever reads elsewhere agree, and are wrong: what the format says decides."""
    from rwkv_edge.qtensor import QTensor

    pack, unpack = QTensor.pack, QTensor.unpack

    def swapped(packed):
        return packed >> 4 | packed << 4

    def mirrored(packed, scales, *, bits, block, n_in):
        return unpack(swapped(packed) if bits == 4 else packed, scales, bits=bits, block=block, n_in=n_in)

    monkeypatch.setattr(QTensor, "pack", lambda q: swapped(pack(q)) if q.bits == 4 else pack(q))
    monkeypatch.setattr(QTensor, "unpack", mirrored)
    export(random_pth("odd"), tmp_path / "b", quant="int4")
    for against in (None, random_pth("odd")):
        failed = check(tmp_path / "b", against)
        assert failed.exit_code == 3, failed.output
        assert ": blocks.0.att.receptance.weight: " in failed.stderr


@pytest.mark.parametrize("kind", ["ane-lut4", "ane-lut6", "gpu-int4"])
def test_core_ml_s_codes_that_are_packed_and_unpacked_wrongly_are_seen(kind, tmp_path, monkeypatch, random_pth):
    from rwkv_edge.qtensor import pack_bits, unpack_bits

    def backwards(data):
        """The bits of every byte in the other order."""
        return np.packbits(np.unpackbits(data.reshape(-1), bitorder="little"), bitorder="big").reshape(data.shape)

    def pack(codes, bits):
        return backwards(np.frombuffer(pack_bits(codes, bits), np.uint8)).tobytes()

    def unpack(data, bits):
        return unpack_bits(backwards(data), bits)

    monkeypatch.setattr("rwkv_edge.exporters.coreml.pack_bits", pack)
    monkeypatch.setattr("rwkv_edge.files.unpack_bits", unpack)
    monkeypatch.setattr("rwkv_edge.mil.unpack_bits", unpack, raising=False)
    export(random_pth("odd"), tmp_path / "b", **KINDS[kind])
    for against in (None, random_pth("odd")):
        failed = check(tmp_path / "b", against)
        assert failed.exit_code == 3, failed.output
        assert ": blocks.0.att.receptance.weight: " in failed.stderr
