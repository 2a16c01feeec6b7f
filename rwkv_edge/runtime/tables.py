"""The tables of RWKV-7a (DeepEmbed): larger than the model, so they stay in their file, mapped into memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..errors import BundleError
from ..files import DTYPES, Record, Stored
from ..qtensor import QTensor


class Tables:
    """One table (V, n) for every layer, of which a step takes a token's row.

    shape  (L, n) of what one token takes
    """

    def __init__(self, tables: Sequence[Stored]) -> None:
        self._tables = [(t, _map(t.data), _map(t.scales) if t.scales else None) for t in tables]
        self.shape = (len(tables), tables[0].shape[1])

    @classmethod
    def of(cls, bundle: Bundle) -> "Tables":
        tables = [bundle.tensors[name] for name in bundle.spec.tables]
        return cls([t for t in tables if isinstance(t, Stored)])

    def rows(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Give the rows of tokens (T,), (T, L, n): what the file holds, and nothing else of it is read."""
        out = np.empty((len(tokens), *self.shape), np.float32)
        for i, (t, data, scales) in enumerate(self._tables):
            if scales is None or t.block is None:
                out[:, i] = data[tokens]
            else:
                q = QTensor.unpack(data[tokens], scales[tokens], bits=t.bits, block=t.block, n_in=t.shape[1])
                out[:, i] = q.dequantize()
        return out


def _map(record: Record) -> npt.NDArray[Any]:
    try:
        return np.memmap(record.path, DTYPES[record.dtype], "r", record.offset, record.shape)
    except OSError as e:
        raise BundleError(f"cannot map {record.path} into memory: {e.strerror}") from e
