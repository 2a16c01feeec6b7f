"""Hugging Face folders: one weights file, or shards that an index lists. Nothing is downloaded.

config.json is asked for what names and shapes cannot tell, see settings.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import magic
from ..errors import CheckpointError
from ..files import Record
from .safetensors import unique
from .settings import Settings, contradiction, describes, from_config, without_config

_MAX_JSON = 1 << 24  # a 14B model's index has 100 kB
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is taken, as transformers does
_BARE = (".pth", ".pt", ".st", ".safetensors", ".gguf")


def find_weights(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Find the files with a folder's weights, and which tensor the index expects where (empty without an index).

    Raises  CheckpointError if there is none, a shard is missing, or without an index there is more than one.
    """
    for name in WEIGHTS:
        if _exists(folder / name):
            return [_regular(folder / name)], {}
        index = folder / f"{name}.index.json"
        if _exists(index):
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
                raise CheckpointError(f"{index} has no weight_map from tensors to files: download it again")
            shards = sorted(set(places.values()))
            for shard in shards:
                # the index comes from outside: it may not lead out of its folder
                if shard in ("", ".", "..") or set(shard) & set("/\\") or not shard.isprintable():
                    raise CheckpointError(f"{index} names {shard!r}: expected files beside it. It may be malicious")
                if not _exists(folder / shard):
                    raise CheckpointError(f"{index} names {shard}, which is not in {folder}: download it as well")
            return [_regular(folder / shard) for shard in shards], places
    files = sorted(file for file in folder.iterdir() if file.suffix in _BARE)
    if not files and _exists(folder / "zero_to_fp32.py"):
        raise CheckpointError(f"{folder} is a DeepSpeed checkpoint: run the zero_to_fp32.py in it, and give what it writes")
    if not files:
        known = ", ".join((*WEIGHTS, *(f"*{suffix}" for suffix in _BARE)))
        raise CheckpointError(f"{folder} is a folder without a checkpoint ({known}): give the checkpoint")
    if len(files) > 1:
        raise CheckpointError(f"{folder} has several checkpoints: give one of {', '.join(repr(f.name) for f in files[:9])}")
    return files, {}


def join(shards: list[tuple[Path, dict[str, Record]]], places: dict[str, str]) -> dict[str, Record]:
    """Take shards together, each tensor where the index says.

    Raises  CheckpointError if a tensor is not there, or is in two shards.
    """
    records: dict[str, Record] = {}
    for file, held in shards:
        twice = next((name for name in held if name in records), None)
        if twice is not None:
            raise CheckpointError(f"{file}: {twice} is in {records[twice].path.name} too: download both again")
        records |= held
    for name, shard_name in places.items():
        if name not in records or records[name].path.name != shard_name:
            shard = shards[0][0].with_name(shard_name)
            raise CheckpointError(f"{shard} has no {name}, which the index says is there: download both again")
    return records


def read_settings(path: Path, layout: str, sizes: Mapping[str, int], version: str) -> Settings:
    """Read the config.json of a folder, or the one beside a file if it describes that file.

    A folder's own must fit the tensors. One that lies beside a file may be anything's: it is read if the file has the names
    of a Hugging Face layout, or is called as such a folder's weights are, and if config.json says that it is of an RWKV of
    this version, width, vocabulary and number of layers.
    """
    file = path / "config.json" if path.is_dir() else path.with_name("config.json")
    if path.is_dir():
        if not _exists(file):
            return without_config(layout, f"{path.name} has no config.json")
        config = read_json(file)
        wrong = contradiction(config, sizes, version)
        if wrong:
            raise CheckpointError(f"{file} {wrong}: it is another model's, or damaged. Download it again")
        return from_config(file, config, layout)
    if layout == "official" and path.name not in WEIGHTS:
        return Settings()
    if not _exists(file):
        return without_config(layout, f"no config.json lies beside {path.name}")
    try:
        config = read_json(file)
        reason = describes(config, sizes, version)
    except CheckpointError:
        config, reason = {}, "cannot be read"
    if reason:
        return without_config(layout, f"the config.json beside {path.name} {reason}, so it is not used")
    return from_config(file, config, layout)


def _exists(file: Path) -> bool:
    return file.exists() or file.is_symlink()  # a link to nothing is there, and refused when it is read


def _regular(file: Path) -> Path:
    if not file.is_file():
        raise CheckpointError(f"{file} is no regular file: download it again")
    return file


def read_json(file: Path) -> dict[str, Any]:
    try:
        if _regular(file).stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, expected at most {_MAX_JSON}: download it again")
        data = file.read_bytes()
        if why := magic.explain(data[: magic.N_BYTES]):
            raise CheckpointError(f"{file} {why}")
        content = json.loads(data, object_pairs_hook=unique)
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file} is damaged ({e}): download it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: expected an object. Download it again")
    return content
