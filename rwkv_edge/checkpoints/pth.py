"""torch's zip files, without torch: a directory of raw records and a small pickle that describes them.

The pickle is not unpickled. Its opcodes are read by a machine that knows dictionaries, tuples, numbers, text and a few names,
so that a file can run no code, and cannot hang or fill the memory either.
Source: pytorch, torch/serialization.py, and torch/_utils.py _rebuild_tensor_v2
"""

import pickletools
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from ..files import DTYPES, Record
from ..spec import Shape

_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
_MAX_PICKLE = 1 << 24  # a 14B checkpoint's pickle is 200 kB
_MAX_ARGS = 16  # of a call, a storage, a shape
_WRAPPERS = ("state_dict", "module", "model")  # of Lightning, DeepSpeed, and many a training script
_OPTIMIZER = re.compile("^optim|exp_avg|^lr_scheduler|^param_groups$")


@dataclass(frozen=True)
class _Name:
    """A name of Python's that the pickle asks for, such as torch._utils._rebuild_tensor_v2."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it: part of one of the file's records."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


def read_pth(path: Path) -> dict[str, Record]:
    """Find every tensor of a torch zip file; reads the pickle only.

    Raises  CheckpointError if the file is no torch zip, is damaged, or its pickle asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as z, open(path, "rb") as f:
            entries = {i.filename: i for i in z.infolist()}
            pickles = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"a zip file, but no torch checkpoint: it has {len(pickles)} data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            for name, most in ((pickles[0], _MAX_PICKLE), (root + "byteorder", 16)):
                if name in entries and (entries[name].compress_type or entries[name].file_size > most):
                    raise CheckpointError(f"{name} has {entries[name].file_size} bytes or is compressed: no torch checkpoint")
            if root + "byteorder" in entries and z.read(root + "byteorder") != b"little":
                raise CheckpointError("saved on a big-endian machine, which is not supported")
            views = _weights(_read_pickle(z.read(pickles[0])))
            return {name: _locate(path, f, entries, f"{root}data/", name, view) for name, view in views.items()}
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except Exception as e:  # a damaged file can raise anything, in the zipfile module and below
        raise CheckpointError(f"{path} is damaged or cut short ({type(e).__name__}: {e}). Download it again") from e


def _weights(content: Any) -> dict[str, _View]:
    """Find the weights by name: at the top, or in the dictionary where a trainer puts them."""
    for _ in range(4):  # wrapped twice is seen; a dictionary in itself has no end
        if not isinstance(content, dict):
            break
        for key in ("_strategy", "_version"):
            if key in content:
                raise CheckpointError(f"this file was converted by ChatRWKV (it has {key!r}): use the original file")
        views = {str(n): v for n, v in content.items() if isinstance(v, _View) and not _OPTIMIZER.search(str(n))}
        unprintable = next((n for n in views if not n.isprintable()), None)
        if unprintable is not None:
            raise CheckpointError(f"a tensor's name is {unprintable!r}: the file is damaged. Download it again")
        if views:
            return views
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        states = next((n for n in content if _OPTIMIZER.search(str(n))), None)
        if inner is None and states is not None:
            raise CheckpointError(
                f"it holds an optimizer's states (it has {states!r}), no weights: give the model's checkpoint"
            )
        content = inner
    raise CheckpointError("it holds no tensors by name, so it is not an RWKV checkpoint: give the model's file")


def _locate(path: Path, f: BinaryIO, entries: dict[str, zipfile.ZipInfo], folder: str, name: str, view: _View) -> Record:
    dtype, entry = view.storage.dtype, entries.get(folder + view.storage.key)
    if dtype not in DTYPES:
        raise CheckpointError(f"{name} is stored as {dtype}: only float32, float16 and bfloat16 can be read")
    if entry is None:
        raise CheckpointError(f"{name} has no data in the file. Download it again")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{name} is compressed: load and save it once with torch.save")
    expected: list[int] = []
    n = 1
    for size in reversed(view.shape):
        expected.insert(0, n)
        n *= size
    if len(view.stride) != len(expected) or any(
        s != e for s, e, size in zip(view.stride, expected, view.shape, strict=True) if size > 1
    ):
        raise CheckpointError(f"{name} is not stored in row order: save it once as tensor.contiguous()")
    itemsize = DTYPES[dtype].itemsize
    if view.offset < 0 or n < 1 or (view.offset + n) * itemsize > entry.file_size:
        raise CheckpointError(f"{name} of shape {view.shape} does not fit its {entry.file_size} bytes of data")
    f.seek(entry.header_offset)
    header = f.read(30)
    n_name, n_extra = struct.unpack("<HH", header[26:])  # the local header's own lengths: they differ from the directory's
    if header[:4] != b"PK\3\4" or f.read(n_name) != (folder + view.storage.key).encode():
        raise CheckpointError(f"{name} is not where the directory says. Download it again")
    start = entry.header_offset + 30 + n_name + n_extra
    return Record(path, start + view.offset * itemsize, dtype, view.shape)


def _read_pickle(data: bytes) -> Any:
    """Read a pickle's opcodes: dictionaries, lists, tuples, numbers, text, and tensors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    n_copied = 0

    def pop_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    def put(items: list[Any]) -> None:
        """Add pairs to the dictionary on the stack."""
        target = stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str | int):
                raise CheckpointError(f"its pickle has a dictionary by {type(key).__name__}: it is no checkpoint of weights")
            target[key] = value

    for op, arg, _ in pickletools.genops(data):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(op.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                items = pop_mark()
                stack[-1].extend(items)
            case "SETITEM":
                items = stack[-2:]
                del stack[-2:]
                put(items)
            case "SETITEMS":
                put(pop_mark())
            case "GLOBAL":
                stack.append(_name(*str(arg).split(" ", 1)))
            case "STACK_GLOBAL":
                module, name = stack[-2:]
                stack[-2:] = [_name(module, name)]
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                args = _few(stack.pop())
                # what a call copies stands in the file once: without a limit, a small file could have it copied without end
                n_copied += sum(len(arg) for arg in args if isinstance(arg, list | dict))
                if n_copied > len(data):
                    raise CheckpointError("its pickle copies more than it holds, which no weights need: it may be malicious")
                stack.append(_call(stack.pop(), args))
            case "BUILD":
                stack.pop()  # attributes of a dictionary, such as its _metadata
            case "STOP":
                return stack.pop()
            case _:
                raise CheckpointError(f"its pickle does {op.name}, which no weights need: it may be malicious")
    raise CheckpointError("its pickle is cut short. Download it again")


_NAMES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),  # in DeepSpeed's param_shapes
    ("builtins", "set"),  # in DeepSpeed's sparse_tensor_module_names
    ("__builtin__", "set"),
}


def _few(args: Any) -> tuple[Any, ...]:
    if not isinstance(args, tuple) or len(args) > _MAX_ARGS:
        raise CheckpointError(f"its pickle has a {type(args).__name__} as arguments. Download it again")
    return args


def _name(module: Any, name: Any) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):  # a tuple in tuples takes forever to hash or to print
        raise CheckpointError("its pickle asks for something that is no name, which no weights need: it may be malicious")
    if (module, name) not in _NAMES and not (module == "torch" and name.endswith("Storage")):
        raise CheckpointError(f"its pickle asks for {module}.{name}, which no weights need: it may be malicious")
    return _Name(module, name)


def _storage(pid: Any) -> _Storage:
    _, kind, key, *_ = _few(pid)
    if not isinstance(kind, _Name) or not isinstance(key, str):
        raise CheckpointError("its pickle describes data that cannot be. Download it again")
    return _Storage(_STORAGES.get(kind.name, kind.name), key)


def _call(name: Any, args: tuple[Any, ...]) -> Any:
    match name:
        case _Name(name="OrderedDict"):
            return dict(args[0]) if args else {}
        case _Name(name="_rebuild_parameter"):
            return args[0]
        case _Name(name="Size" | "set"):
            return tuple(args[0])
        case _Name(name="_rebuild_tensor_v2"):
            storage, offset, shape, stride, *_ = args
            places = (offset, *_few(shape), *_few(stride))
            if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in places):
                raise CheckpointError("its pickle describes a tensor that cannot be. Download it again")
            return _View(storage, offset, tuple(shape), tuple(stride))
    raise CheckpointError(f"its pickle calls a {type(name).__name__}, which no weights need: it may be malicious")
