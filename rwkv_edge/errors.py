"""What can go wrong, as one tree.

    RwkvEdgeError
    ├── CheckpointError  cannot read, unknown version, tensor missing or misshapen
    ├── QuantizeError    bits, block or method do not fit this tensor
    ├── ExportError      the target cannot express this, or its library is missing
    ├── OutputError      the place to write to exists, is full, or cannot be written
    ├── BundleError      manifest missing, damaged, or from a newer format
    ├── StateError       belongs to another model, or is damaged
    ├── InputError       tokens, text or sampling settings the model cannot take
    ├── BackendError     not available on this machine, or it failed
    └── CheckFailed      numbers differ more than allowed; carries the report

A message says what, with the value; what was expected; and what to do.
"""


class RwkvEdgeError(Exception):
    """Anything this package refuses or fails to do, in one line for a person to read."""


class CheckpointError(RwkvEdgeError):
    """The checkpoint cannot be read, is of an unknown version, or a tensor is missing or misshapen."""


class QuantizeError(RwkvEdgeError):
    """Bits, block or method do not fit this tensor."""


class ExportError(RwkvEdgeError):
    """The target cannot express this model, or its library is missing."""


class OutputError(RwkvEdgeError):
    """The place to write to exists already, is full, or cannot be written."""


class BundleError(RwkvEdgeError):
    """The bundle's manifest is missing, damaged, or from a newer format, or a file does not match it."""


class StateError(RwkvEdgeError):
    """The state belongs to another model, or is damaged."""


class InputError(RwkvEdgeError, ValueError):
    """Tokens, text or sampling settings that the model cannot take."""


class BackendError(RwkvEdgeError):
    """What runs the graphs is not available on this machine, or it failed."""


class CheckFailed(RwkvEdgeError):  # noqa: N818 (what happened, not a fault)
    """A bundle does not compute its own weights, or they are not its checkpoint's.

    report  rwkv_edge.check.Report: the numbers
    """

    def __init__(self, message: str, report: object) -> None:
        super().__init__(message)
        self.report = report
