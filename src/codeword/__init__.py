"""Codeword makes trained networks small by weight sharing: one dial in, one small verified file out, and back.

    artifact = codeword.compress("model.safetensors", target="30x")
    artifact.save("model.cw")

What is not named here is not public. Importing this package imports no torch.
"""

from codeword.api import (
    Compressed,
    TargetMissed,
    compress,
    decompress,
    evaluate,
    fit,
    inspect,
    load,
    state_dict,
    swap,
    verify,
)
from codeword.artifact import Artifact
from codeword.errors import CodewordError
from codeword.finetune import Finetune
from codeword.forecast import Forecast, dry_run
from codeword.front import Front
from codeword.methods import (
    Birch,
    DensityKMeans,
    FixedPoint,
    Keep,
    KernelTemplates,
    KMeans,
    Lloyd,
    Method,
    ProductQuantization,
    Prune,
    RateAware,
    RowScaled,
)
from codeword.plan import Plan, Rule
from codeword.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "Birch",
    "CodewordError",
    "Compressed",
    "DensityKMeans",
    "Finetune",
    "FixedPoint",
    "Forecast",
    "Front",
    "KMeans",
    "Keep",
    "KernelTemplates",
    "Lloyd",
    "Method",
    "Plan",
    "ProductQuantization",
    "Prune",
    "RateAware",
    "RowScaled",
    "Rule",
    "TargetMissed",
    "compress",
    "decompress",
    "dry_run",
    "evaluate",
    "fit",
    "inspect",
    "load",
    "state_dict",
    "swap",
    "sweep",
    "verify",
]
