"""How near two computations of the same numbers are, on any processor."""

from torch import Tensor


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b| in float64; 0 where both are equal, NaN where either has one.

    Of the whole tensor, never of one element: how far rounding moves an element follows from the terms that it is a sum
    of, and a sum near 0 of large terms has lost its digits. Which of them differs between processors, whose matrix
    products add in different orders, and on one processor between shapes.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    a, b = ours.detach().double(), theirs.detach().double()
    difference = (a - b).abs().max()
    return float(difference / b.abs().max()) if difference != 0 else 0.0
