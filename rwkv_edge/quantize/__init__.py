"""From floats to small integers: pure functions, and the plan that says which tensor gets which."""

from . import declared
from .calibrate import mean_squares
from .kmeans import kmeans
from .plan import COREML_DEFAULTS, COREML_QUANTS, QUANTS, coreml_plan, plan
from .rtn import rtn, with_half_scales

__all__ = [
    "COREML_DEFAULTS",
    "COREML_QUANTS",
    "QUANTS",
    "coreml_plan",
    "declared",
    "kmeans",
    "mean_squares",
    "plan",
    "rtn",
    "with_half_scales",
]
