"""Every error Codeword raises on purpose.

    CodewordError                    exit code of the command line
    ├── SourceError                  3  a checkpoint is missing, unreadable, unsafe, or does not say what it should
    │   └── NonFiniteError           3  a tensor holds NaN or infinity
    ├── FormatError                  4  a .cw file is truncated, corrupted, hostile, or from a newer version
    │   └── ExprError                4  an expression contradicts itself (shapes, code ranges)
    ├── PlanError                    5  a plan, method option or glob is wrong
    ├── TargetError                  6  a target cannot be read, or the written file misses it
    ├── DataError                    7  evaluation data is missing or malformed
    ├── WriteError                   8  the output could not be written; what was there before is untouched
    ├── MismatchError                9  a model and a file do not fit each other
    ├── MissingDependencyError      10  an optional package is needed for this; the message says which extra brings it
    ├── WorkerError                 11  a worker process ended before its work did
    └── TrainingError               12  training came to a loss that is no number

A message names the thing, the place, both values and the way out. Code 1 is kept for `verify` finding a difference
and 2 for a wrong command line (Typer's own).
"""


class CodewordError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class SourceError(CodewordError):
    """A checkpoint is missing, unreadable, unsafe to read, or inconsistent."""

    exit_code = 3


class NonFiniteError(SourceError):
    """A tensor to be compressed holds NaN or infinity."""


class FormatError(CodewordError):
    """A .cw file is truncated, corrupted, hostile, or written by a newer version."""

    exit_code = 4


class ExprError(FormatError):
    """An expression contradicts itself: shapes that do not fit, codes past the end of a codebook."""


class PlanError(CodewordError):
    """A plan, a method's option, or a glob is wrong."""

    exit_code = 5


class TargetError(CodewordError):
    """A target cannot be read, or no result meets it."""

    exit_code = 6


class DataError(CodewordError):
    """Evaluation data is missing or malformed."""

    exit_code = 7


class WriteError(CodewordError):
    """The output could not be written; a file that was there before is untouched."""

    exit_code = 8


class MismatchError(CodewordError):
    """A model and a file do not fit each other."""

    exit_code = 9


class MissingDependencyError(CodewordError):
    """An optional package is needed; the message names the extra that brings it."""

    exit_code = 10


class WorkerError(CodewordError):
    """A worker process ended before its work did: killed for memory most often, or never able to start."""

    exit_code = 11


class TrainingError(CodewordError):
    """Training came to a loss that is no number; net and stage are as they were after the last good epoch."""

    exit_code = 12
