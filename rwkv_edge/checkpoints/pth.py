"""torch's zip files, without torch: a directory of raw records and a small pickle that describes them.

The pickle is not unpickled. Its opcodes are read by a machine that knows dictionaries, tuples, numbers, text and a few names,
so that a file can run no code, and cannot hang or fill the memory either.
Source: pytorch, torch/serialization.py, and torch/_utils.py _rebuild_tensor_v2
"""

import math
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

_STORAGES = {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64"}
_MAX_PICKLE = 1 << 24  # a 14B checkpoint's pickle is 200 kB
_MAX_ARGS = 16  # of a call, a storage, a shape
# of Lightning, DeepSpeed, and many a training script: the first that is there is taken
_WRAPPERS = ("state_dict", "module", "model", "model_state_dict", "model_state", "weights", "params", "net")
_OPTIMIZER = re.compile("^optim|exp_avg|^lr_scheduler|^param_groups$")
_AVERAGED = re.compile(r"(^|_)(ema|averaged|shadow|swa)(_|$)", re.IGNORECASE)  # a second copy of the weights
_MAX_DEPTH = 4  # of dictionaries in dictionaries, and so many of them: one in itself has no end
_MAX_DICTIONARIES = 1000


@dataclass(frozen=True)
class _Name:
    """A name of Python's that the pickle asks for, such as torch._utils._rebuild_tensor_v2."""

    module: str
    name: str


@dataclass(frozen=True)
class _Foreign:
    """An object of another kind, of a class or made by a function that does no harm."""

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


def read_pth(path: Path) -> tuple[dict[str, Record], tuple[str, ...]]:
    """Find every tensor of a torch zip file, where a trainer puts the weights, of a type that can be read or of another.

    Reads the pickle only. Also gives notes on what the file holds beside the weights.

    Raises  CheckpointError if the file is no torch zip, is damaged, or its pickle asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as z, open(path, "rb") as f:
            entries = {i.filename: i for i in z.infolist()}
            pickles = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(
                    f"a zip file, but no torch checkpoint: it has {len(pickles)} data.pkl{_what_else(list(entries))}"
                )
            root = pickles[0].removesuffix("data.pkl")
            if root + "constants.pkl" in entries:
                raise CheckpointError("a TorchScript archive, code and weights: give the .pth that it was made from")
            for name, most in ((pickles[0], _MAX_PICKLE), (root + "byteorder", 16)):
                if name in entries and (entries[name].compress_type or entries[name].file_size > most):
                    raise CheckpointError(f"{name} has {entries[name].file_size} bytes or is compressed: no torch checkpoint")
            if root + "byteorder" in entries and z.read(root + "byteorder") != b"little":
                raise CheckpointError("saved on a big-endian machine, which is not supported")
            content, foreign = _read_pickle(z.read(pickles[0]))
            if foreign:
                raise CheckpointError(_how_to_save(path, content, foreign))
            views, notes = _weights(content)
            return {name: _locate(path, f, entries, f"{root}data/", name, view) for name, view in views.items()}, tuple(notes)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    except Exception as e:  # a damaged file can raise anything, in the zipfile module and below
        raise CheckpointError(f"{path} is damaged or cut short ({type(e).__name__}: {e}). Download it again") from e


def _what_else(names: list[str]) -> str:
    """What a zip file without a torch checkpoint is, and what to do."""
    if any(name.endswith(".npy") for name in names):
        return ". It is a numpy archive (.npz): give the .pth or safetensors that it was made from"
    return ". Unpack it and give the checkpoint inside"


def _how_to_save(path: Path, content: Any, foreign: "_Foreign") -> str:
    """What a checkpoint with objects of a trainer's is, and how its weights are saved alone."""
    key = next((k for k in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(k), dict)), None)
    weights = f"[{key!r}]" if key else "" if isinstance(content, dict) else ".state_dict()"
    what = "a training checkpoint" if isinstance(content, dict) else "a whole Python object"
    return (
        f"{what}, not weights alone: its pickle holds {foreign.module}.{foreign.name}. If you trust the file, save "
        f"the weights alone: torch.save(torch.load({path.name!r}, weights_only=False){weights}, 'weights.pth')"
    )


def _weights(content: Any) -> tuple[dict[str, _View], list[str]]:
    """Find the weights by name: at the top, or in the dictionary where a trainer puts them; and say what was chosen."""
    found: list[tuple[str, dict[str, _View]]] = []
    optimizer: str | None = None
    todo: list[tuple[tuple[str, ...], Any]] = [((), content)]
    n_seen = 0
    while todo and n_seen < _MAX_DICTIONARIES:
        keys, holder = todo.pop(0)
        n_seen += 1
        if not isinstance(holder, dict):
            continue
        for key in ("_strategy", "_version"):
            if key in holder:
                raise CheckpointError(f"this file was converted by ChatRWKV (it has {key!r}): use the original file")
        optimizer = optimizer or next((str(n) for n in holder if _OPTIMIZER.search(str(n))), None)
        inside = {str(n): v for n, v in holder.items() if not _OPTIMIZER.search(str(n))}
        views = {n: v for n, v in inside.items() if isinstance(v, _View)}
        unprintable = next((n for n in views if not n.isprintable()), None)
        if unprintable is not None:
            raise CheckpointError(f"a tensor's name is {unprintable!r}: the file is damaged. Download it again")
        if views:
            found.append((".".join(keys), views))
        if len(keys) < _MAX_DEPTH:
            todo += [((*keys, n), v) for n, v in inside.items() if isinstance(v, dict)]
    if not found:
        if optimizer is not None:
            raise CheckpointError(
                f"it holds an optimizer's states (it has {optimizer!r}), no weights: give the model's checkpoint"
            )
        raise CheckpointError("it holds no tensors by name, so it is not an RWKV checkpoint: give the model's file")
    return _choose(found)


def _is_named(name: str, view: _View) -> bool:
    """Tell whether this can be a weight: of a name of several parts, and more than one number."""
    return "." in name and math.prod(view.shape) != 1


def _choose(found: list[tuple[str, dict[str, _View]]]) -> tuple[dict[str, _View], list[str]]:
    """Choose the weights among dictionaries of tensors: rather not a moving average, rather where trainers put them.

    Weights have names of several parts. Tensors with names of one part are a trainer's: counters, a random generator's state.
    """
    named = [(where, views) for where, views in found if any(_is_named(*i) for i in views.items())]

    def rank(candidate: tuple[str, dict[str, _View]]) -> tuple[bool, int]:
        where = candidate[0]
        first = where.split(".")[0]
        return bool(_AVERAGED.search(where)), 0 if not where else _WRAPPERS.index(first) + 1 if first in _WRAPPERS else 99

    where, views = min(named or found, key=rank)
    if not named:
        return views, []
    notes = []
    others = [repr(other) for other, _ in named if other != where]
    if others or _AVERAGED.search(where):
        average = ", a moving average of them" if _AVERAGED.search(where) else ""
        beside = f"; the file also has {', '.join(others[:3])}" if others else ""
        notes.append(f"the weights were taken from {repr(where) if where else 'the top level'}{average}{beside}")
    beside_weights = sorted(n for n in views if "." not in n)
    if beside_weights:
        notes.append(f"left out what stands beside the weights: {', '.join(beside_weights[:3])}")
    return {n: v for n, v in views.items() if "." in n}, notes


def _locate(path: Path, f: BinaryIO, entries: dict[str, zipfile.ZipInfo], folder: str, name: str, view: _View) -> Record:
    dtype, entry = view.storage.dtype, entries.get(folder + view.storage.key)
    if dtype not in DTYPES:
        return Record(path, 0, dtype, view.shape)
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


def _read_pickle(data: bytes) -> tuple[Any, _Foreign | None]:
    """Read a pickle's opcodes: dictionaries, lists, tuples, numbers, text, and tensors.

    Also gives the first harmless object that it holds beside these. Nothing is made of such an object.
    """
    stack: list[Any] = []
    foreign: _Foreign | None = None
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
        if isinstance(target, _Foreign):
            return
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
                if not isinstance(stack[-1], _Foreign):
                    stack[-1].append(value)
            case "APPENDS":
                items = pop_mark()
                if not isinstance(stack[-1], _Foreign):
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
            case "NEWOBJ" if isinstance(stack[-2], _Foreign):
                stack.pop()  # its arguments
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
                return stack.pop(), foreign
            case _:
                raise CheckpointError(f"its pickle does {op.name}, which no weights need: it may be malicious")
        if stack and isinstance(stack[-1], _Foreign):
            foreign = foreign or stack[-1]
    raise CheckpointError("its pickle is cut short. Download it again")


_NAMES = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),  # of new types, such as float8
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"),
    ("torch", "device"),
    ("torch", "Size"),  # in DeepSpeed's param_shapes
    ("builtins", "set"),  # in DeepSpeed's sparse_tensor_module_names
    ("__builtin__", "set"),
}


# tensors of torch's that are no array of numbers: quantized, sparse, or of a class of their own, such as torchao's
_SPECIAL = re.compile(r"torch\.(_utils\._rebuild_(q|sparse_|nested_|wrapper_)\w+|_tensor\._rebuild_from_type_v2)")
_DTYPES = re.compile(r"u?int\d+|b?float\d+\w*|bool|complex\d+|q?u?int\d+|half|double")  # torch.float8_e4m3fn and the like
# objects of trainers and of torch that do nothing when they are loaded: told from what may be malicious, and never made
_HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w*Path|datetime\.\w+|collections\.(defaultdict|Counter|deque)"
    r"|_codecs\.encode|copy_?reg\._reconstructor|(__builtin__|builtins)\.(object|dict|list|int|long|float|str|bool)"
    r"|numpy\.(dtype|ndarray)|numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)"
    r"|(pytorch_lightning|lightning|lightning_fabric|omegaconf|transformers|accelerate|deepspeed|peft|fla)\.([\w.]+\.)?[A-Z]\w*"
    r"|torch\.(nn|optim)\.[\w.]+\.[A-Z]\w*"
    r"|(__main__|src|model|models|rwkv\w*|train|trainer)\.([\w.]+\.)?[A-Z]\w*"
)


def _few(args: Any) -> tuple[Any, ...]:
    if not isinstance(args, tuple) or len(args) > _MAX_ARGS:
        raise CheckpointError(f"its pickle has a {type(args).__name__} as arguments. Download it again")
    return args


def _name(module: Any, name: Any) -> _Name | _Foreign:
    if not isinstance(module, str) or not isinstance(name, str):  # a tuple in tuples takes forever to hash or to print
        raise CheckpointError("its pickle asks for something that is no name, which no weights need: it may be malicious")
    storage = module in ("torch", "torch.storage") and name.endswith("Storage")
    if (module, name) in _NAMES or storage or (module == "torch" and _DTYPES.fullmatch(name)):
        return _Name(module, name)
    if _SPECIAL.fullmatch(f"{module}.{name}"):
        raise CheckpointError(
            f"it holds tensors that are quantized, sparse or of a class of their own ({module}.{name}): give the original "
            "checkpoint, not quantized"
        )
    if not _HARMLESS.fullmatch(f"{module}.{name}"):
        raise CheckpointError(f"its pickle asks for {module}.{name}, which no weights need: it may be malicious")
    return _Foreign(module, name)


def _storage(pid: Any) -> _Storage:
    _, kind, key, *_ = _few(pid)
    if not isinstance(kind, _Name) or not isinstance(key, str):
        raise CheckpointError("its pickle describes data that cannot be. Download it again")
    return _Storage(_STORAGES.get(kind.name, kind.name), key)


def _call(name: Any, args: tuple[Any, ...]) -> Any:
    match name:
        case _Name(name="OrderedDict"):
            return dict(args[0]) if args else {}
        case _Foreign():
            return name
        case _Name(name="_rebuild_parameter" | "_rebuild_parameter_with_state"):
            return args[0]
        case _Name(name="device"):
            return args
        case _Name(name="Size" | "set"):
            return tuple(args[0])
        case _Name(name="_rebuild_tensor_v2" | "_rebuild_tensor_v3" as kind):
            storage, offset, shape, stride, *more = args
            places = (offset, *_few(shape), *_few(stride))
            if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in places):
                raise CheckpointError("its pickle describes a tensor that cannot be. Download it again")
            if kind.endswith("v3"):
                dtype = next((a.name for a in more if isinstance(a, _Name)), storage.dtype)
                storage = _Storage(dtype, storage.key)
            return _View(storage, offset, tuple(shape), tuple(stride))
    raise CheckpointError(f"its pickle calls a {type(name).__name__}, which no weights need: it may be malicious")
