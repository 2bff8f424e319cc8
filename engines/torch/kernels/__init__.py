"""The arithmetic of an int8 pass, compiled by numba: products in integers, and all around them.

A row's result has the same bits whatever rows are beside it, however many threads work and on
whatever processor, because every operation is exact or rounded as IEEE 754 says, and each row's
operations come in one order:

* A product's sums are whole numbers below 2³¹, exact in any order.
* +, −, ×, ÷, √ and comparison are rounded correctly, vectorised or not. numba fuses no product with
  a sum unless it is asked to. The exponential is a polynomial of these operations.
* A sum of floating-point numbers runs over eight fixed lanes, then over the lanes.

A pass is `run`: each thread runs the whole function on its share of every step and waits for the
others between steps. Rows of several sessions, and of chains and trees of tokens, run together; a
row attends to its session's prefix and its ancestors among the rows, in order of position.
"""

from engines.torch.kernels.instructions import BLOCK
from engines.torch.kernels.passes import UNIT, largest_activation, multiply, run, run_layer
from engines.torch.kernels.row import exp_sums, most_probable

__all__ = [
    "BLOCK",
    "UNIT",
    "exp_sums",
    "largest_activation",
    "most_probable",
    "multiply",
    "run",
    "run_layer",
]
