"""Training of compressed nets: stages that a loop of one's own, or ours, calls once after each optimizer step.

Needs torch, so `import codeword` does not import this package.
"""

from codeword.train.macs import Counts, count
from codeword.train.prune import Pruner
from codeword.train.tune import Tuner

__all__ = ["Counts", "Pruner", "Tuner", "count"]
