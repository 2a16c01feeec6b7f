"""What a file is by its first bytes, where it is not the file that was asked for.

Source: git-lfs, docs/spec.md; the formats' own specifications; github.com/RWKV/rwkv.cpp, docs/FILE_FORMAT.md;
        github.com/ggerganov/llama.cpp before GGUF, llama.h; github.com/onnx/onnx, onnx.proto (field 1 is ir_version)
"""

import re
from pathlib import Path

N_BYTES = 512  # that are looked at: a pointer has about 130, and a tar archive's mark is at 257

_UNPACK = "unpack it and give the file inside"
_OTHER = "give the .pth or safetensors that it was made from"
_DOWNLOAD = "download the file itself"

# a pattern for the first bytes, what such a file is, and what to do
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (rb"", "is empty", "download it again"),
    (rb"version https://(git-lfs|hawser)\.", "is a Git LFS pointer, not the file itself", "run git lfs pull, or " + _DOWNLOAD),
    (rb"(?i)\s*(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body)", "is a web page (HTML)", _DOWNLOAD + ", not its page"),
    (rb"\s*<(\?xml|Error>)", "is an XML document, as a server's error is", _DOWNLOAD),
    (rb'\s*\{\s*"error"|(Entry |Repository )?[Nn]ot [Ff]ound|Invalid username', "is a server's error message", _DOWNLOAD),
    (rb"\x1f\x8b", "is a gzip archive", _UNPACK),
    (rb"BZh[1-9]", "is a bzip2 archive", _UNPACK),
    (rb"\xfd7zXZ\0", "is an xz archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "is a Zstandard archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "is an LZ4 archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", _UNPACK),
    (rb"Rar!\x1a\x07", "is a RAR archive", _UNPACK),
    (rb"[\s\S]{257}ustar", "is a tar archive", _UNPACK),
    (rb"lmgg|fmgg|tjgg", "is a ggml file of rwkv.cpp or an early llama.cpp, before GGUF", _OTHER),
    (rb"algg", "is a ggml LoRA of an early llama.cpp", "give the LoRA that it was made from"),
    (rb"\x93NUMPY", "is one numpy array (.npy)", _OTHER),
    (rb"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes", _OTHER),
    (rb"[\s\S]{4}TFL3", "is a TensorFlow Lite model", _OTHER),
    (rb"[\x81-\x8f\xde\xdf][\xa0-\xbf\xd9\0][\w.\0]", "is a msgpack file, as Flax writes", _OTHER),
    (rb"\x08[\x01-\x0f][\x12\x1a\x3a\x42]", "is an ONNX model", _OTHER),
)


def explain(head: bytes) -> str | None:
    """Say what a file is and what to do, by its first N_BYTES bytes; None if it is none of the kinds that are known here."""
    for pattern, kind, advice in _KINDS:
        if re.match(pattern, head) if pattern else not head:
            return f"{kind}: {advice}"
    return None


def read_head(path: Path) -> bytes:
    """Read the first bytes of a file.

    Raises  OSError
    """
    with open(path, "rb") as f:
        return f.read(N_BYTES)
