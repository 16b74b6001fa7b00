"""The methods: frozen options, and the few lines that call the arithmetic and build an expression.

A method is any object with `compress(weight, importance, *, generator) -> Expr`. The union `BuiltIn` is the whole list
of those a plan file can name; pass an object of your own to `Plan` for anything else, nothing is registered.
"""

from typing import TypeAlias

from codeword.methods.base import Granularity, Method, Scales, as_rows, row_scales
from codeword.methods.prune import Prune
from codeword.methods.rate_aware import RateAware, Start
from codeword.methods.scalar import FixedPoint, Keep, KMeans, is_lossless, round_mantissa
from codeword.methods.scalar_starts import Birch, DensityKMeans, Lloyd, RowScaled
from codeword.methods.vector import KernelTemplates, ProductQuantization

BuiltIn: TypeAlias = (
    Keep
    | FixedPoint
    | KMeans
    | RateAware
    | ProductQuantization
    | KernelTemplates
    | Lloyd
    | DensityKMeans
    | Birch
    | RowScaled
    | Prune
)

__all__ = [
    "Birch",
    "BuiltIn",
    "DensityKMeans",
    "FixedPoint",
    "Granularity",
    "KMeans",
    "Keep",
    "KernelTemplates",
    "Lloyd",
    "Method",
    "ProductQuantization",
    "Prune",
    "RateAware",
    "RowScaled",
    "Scales",
    "Start",
    "as_rows",
    "is_lossless",
    "round_mantissa",
    "row_scales",
]
