"""From floats to small integers: pure functions, and the plan that says which tensor gets which."""

from .calibrate import mean_squares
from .kmeans import kmeans
from .plan import QUANTS, plan
from .rtn import rtn

__all__ = ["QUANTS", "kmeans", "mean_squares", "plan", "rtn"]
