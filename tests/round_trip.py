"""A tensor through a file and back, and how far from the original it is: what tests of methods ask."""

import numpy as np

from codeword.artifact import Writer, code_tensor


def restored(expr, weight):
    """The tensor as a file gives it back."""
    writer = Writer()
    writer.add(code_tensor("w", str(weight.dtype), weight.shape, expr))
    with writer.finish() as artifact:
        return artifact.decode("w")


def error(found, weight):
    """Squared error over energy."""
    wide = weight.astype(np.float64)
    return float(np.sum((found.astype(np.float64) - wide) ** 2) / np.sum(wide**2))
