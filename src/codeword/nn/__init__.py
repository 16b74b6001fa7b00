"""Compressed nets in PyTorch: the differentiable twin of `decode`, modules that run from it, and the way into a model.

Needs torch, so `import codeword` does not import this package.
"""

from codeword.nn.factored import FactoredConv2d
from codeword.nn.modules import CodedConv, CodedEmbedding, CodedLinear, CodedModule
from codeword.nn.state import load_into, state_dict
from codeword.nn.swap import swap, swap_report
from codeword.nn.twin import TorchExpr

__all__ = [
    "CodedConv",
    "CodedEmbedding",
    "CodedLinear",
    "CodedModule",
    "FactoredConv2d",
    "TorchExpr",
    "load_into",
    "state_dict",
    "swap",
    "swap_report",
]
