"""From floats to small integers: pure functions, and the plan that says which tensor gets which."""

from .plan import QUANTS, plan
from .rtn import rtn

__all__ = ["QUANTS", "plan", "rtn"]
