"""Take an RWKV language model from its checkpoint to an app.

    from rwkv_edge import export, open_bundle

    export("rwkv7-0.1b.pth", "rwkv7-0.1b-int4", quant="int4")
    model = open_bundle("rwkv7-0.1b-int4")
    for token in model.generate("Once upon a time", max_tokens=64):
        print(token.text, end="")

Nothing is loaded before it is used: importing this package imports neither numpy nor onnxruntime.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .convert import export as export
    from .errors import BackendError as BackendError
    from .errors import BundleError as BundleError
    from .errors import CheckFailed as CheckFailed
    from .errors import CheckpointError as CheckpointError
    from .errors import ExportError as ExportError
    from .errors import InputError as InputError
    from .errors import OutputError as OutputError
    from .errors import QuantizeError as QuantizeError
    from .errors import RwkvEdgeError as RwkvEdgeError
    from .errors import StateError as StateError
    from .runtime import Chat as Chat
    from .runtime import Generation as Generation
    from .runtime import Model as Model
    from .runtime import Sampling as Sampling
    from .runtime import State as State
    from .runtime import Token as Token
    from .runtime import open_bundle as open_bundle

_HOMES = {
    "export": ".convert",
    "RwkvEdgeError": ".errors",
    "BackendError": ".errors",
    "BundleError": ".errors",
    "CheckFailed": ".errors",
    "CheckpointError": ".errors",
    "ExportError": ".errors",
    "InputError": ".errors",
    "OutputError": ".errors",
    "QuantizeError": ".errors",
    "StateError": ".errors",
    "Chat": ".runtime",
    "Generation": ".runtime",
    "Model": ".runtime",
    "Sampling": ".runtime",
    "State": ".runtime",
    "Token": ".runtime",
    "open_bundle": ".runtime",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
