"""torch's zip files, without torch: a directory of raw records and a small pickle that describes them.

The pickle is read by an unpickler that knows a handful of names and resolves nothing else, so a file can run no code.
Source: pytorch, torch/serialization.py, and torch/_utils.py _rebuild_tensor_v2
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import DTYPES, Record
from ..spec import Shape

_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
_MAX_PICKLE = 1 << 28  # a 14B checkpoint's pickle is 200 kB


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: part of one of the file's records."""

    dtype: str
    key: str
    offset: int
    shape: Shape
    stride: Shape


def read_pth(path: Path) -> dict[str, Record]:
    """Find every tensor of a torch zip file; reads the pickle only.

    Raises  CheckpointError if the file is no torch zip, is damaged, or its pickle asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as z:
            pickles = [i for i in z.infolist() if i.filename.endswith("/data.pkl") or i.filename == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"a zip file, but no torch checkpoint: it has {len(pickles)} data.pkl")
            if pickles[0].file_size > _MAX_PICKLE:
                raise CheckpointError(f"its pickle has {pickles[0].file_size} bytes, which no checkpoint needs")
            root = pickles[0].filename.removesuffix("data.pkl")
            if root + "byteorder" in z.namelist() and z.read(root + "byteorder") != b"little":
                raise CheckpointError("saved on a big-endian machine, which is not supported")
            with z.open(pickles[0]) as f:
                content = _Unpickler(f).load()
            entries = {i.filename: i for i in z.infolist()}
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except zipfile.BadZipFile as e:
        raise CheckpointError(f"{path} is damaged or cut short: {e}. Download it again") from e
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except Exception as e:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} has a damaged pickle ({type(e).__name__}: {e}). Download it again") from e
    if not isinstance(content, dict) or not any(isinstance(v, _View) for v in content.values()):
        raise CheckpointError(f"{path} holds no tensors by name: it is not an RWKV checkpoint")
    with open(path, "rb") as f:
        return {
            str(name): _locate(path, f, entries, f"{root}data/", str(name), view)
            for name, view in content.items()
            if isinstance(view, _View)
        }


def _locate(path: Path, f: Any, entries: dict[str, zipfile.ZipInfo], root: str, name: str, view: _View) -> Record:
    entry = entries.get(root + view.key)
    if entry is None:
        raise CheckpointError(f"{path}: {name} has no data in the file. Download it again")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: {name} is compressed: load and save it once with torch.save")
    expected, n = [], 1
    for size in reversed(view.shape):
        expected.append(n)
        n *= size
    if any(s != e for s, e, size in zip(view.stride, reversed(expected), view.shape, strict=True) if size > 1):
        raise CheckpointError(f"{path}: {name} is not stored in row order: save it once as tensor.contiguous()")
    itemsize = DTYPES[view.dtype].itemsize
    if view.offset < 0 or n < 1 or (view.offset + n) * itemsize > entry.file_size:
        raise CheckpointError(f"{path}: {name} of shape {view.shape} does not fit its {entry.file_size} bytes of data")
    f.seek(entry.header_offset + 26)  # the local header's own lengths: they differ from the directory's
    n_name, n_extra = struct.unpack("<HH", f.read(4))
    start = entry.header_offset + 30 + n_name + n_extra
    return Record(path, start + view.offset * itemsize, view.dtype, view.shape)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        found = _ALLOWED.get((module, name))
        if found is None:
            if module == "torch" and name.endswith("Storage"):
                raise CheckpointError(f"a tensor is stored as {name}: only float32, float16 and bfloat16 can be read")
            raise CheckpointError(f"the file's pickle asks for {module}.{name}, which no weights need: it may be malicious")
        return found

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, key, *_ = pid
        return dtype, str(key)


def _rebuild_tensor(storage: tuple[str, str], offset: int, shape: Any, stride: Any, *rest: Any) -> _View:
    dtype, key = storage
    if dtype not in DTYPES:
        raise ValueError(f"storage {dtype!r}")
    return _View(dtype, key, int(offset), tuple(int(s) for s in shape), tuple(int(s) for s in stride))


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}
