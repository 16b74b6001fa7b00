"""What a training run is asked for and what it records: `Finetune` and `History`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import msgspec

from codeword.errors import PlanError

Optimizer: TypeAlias = Literal["adam", "adamw", "sgd"]
Mixed: TypeAlias = Literal["auto", "off", "bf16"]
Keeping: TypeAlias = Literal["best", "last"]
_MOST_HELD_OUT = 5_000
_HELD_OUT_SHARE = 0.1
_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda value: 0 < value < math.inf, "a positive number"),
    "temperature": (lambda value: 0 < value < math.inf, "a positive number"),
    "weight_decay": (lambda value: 0 <= value < math.inf, "a number >= 0"),
    "distill": (lambda value: 0 <= value <= 1, "a number in 0..1"),
    "sparsity": (lambda value: 0 < value < 1, "a number between 0 and 1"),
}


class Finetune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to train a compressed net; the defaults suit most.

    The learning rate rises over the first twentieth of all steps to learning_rate and falls along half a cosine to 0.
    batch_size: examples a step, of all processes together; a loader brings its own. distill: the share of the loss that
    is to give the outputs of the uncompressed net at `temperature`, the rest being to give the labels; with 1 no labels
    are needed. class_dim: the dimension of the outputs that holds the classes; not needed for outputs (n, classes), nor
    under cross entropy, where it is 1. reassign_every: steps after which each weight takes the codeword that suits it
    best by then; None: never.

    held_out: examples of a Dataset that are not trained on but scored after each epoch; None: 5,000, or a tenth if
    that is less. keep: the state of the epoch that did best on them, or of the last. mixed: "bf16" computes in
    bfloat16 under weights in float32, "auto" does so where the processor multiplies them fast. shift, mirror: move
    each image by up to so many pixels, zeros coming in, and turn half of them round. blend: mix each input with another
    of its batch, which has no label then: for distill=1, to learn the uncompressed net between images, too.
    reestimate_norms: measure the running statistics of batch norms anew at the end, which helps some nets and hurts
    others.

    sparsity: prune to this share of zeros first, in prune_epochs (None: as many as epochs). seed: of the order of the
    examples, and of everything else that is random.
    """

    epochs: int = 10
    learning_rate: float = 2e-3
    batch_size: int = 128
    optimizer: Optimizer = "adam"
    weight_decay: float = 0.0
    distill: float = 0.5
    temperature: float = 2.0
    class_dim: int | None = None
    reassign_every: int | None = 5
    held_out: int | None = None
    keep: Keeping = "best"
    mixed: Mixed = "auto"
    compile: bool = False
    shift: int = 0
    mirror: bool = False
    blend: bool = False
    reestimate_norms: bool = False
    sparsity: float | None = None
    prune_epochs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "reassign_every": 1, "held_out": 0, "shift": 0}
        for name, value in (least | {"prune_epochs": 1, "seed": 0}).items():
            given = getattr(self, name)
            if given is not None and (type(given) is not int or given < value):
                raise PlanError(f"finetune: {name} must be a whole number >= {value}, got {given!r}")
        if self.class_dim is not None and type(self.class_dim) is not int:
            raise PlanError(f"finetune: class_dim must be a whole number such as 1 or -1, got {self.class_dim!r}")
        for name, (fits, what) in _NUMBERS.items():
            given = getattr(self, name)
            if not (name == "sparsity" and given is None) and not (type(given) in (int, float) and fits(given)):
                raise PlanError(f"finetune: {name} must be {what}, got {given!r}")
        if self.blend and self.distill != 1:
            raise PlanError(f"finetune: blend mixes inputs, which have no label then; distill is {self.distill}, not 1")
        if self.prune_epochs is not None and self.sparsity is None:
            raise PlanError(f"finetune: prune_epochs is {self.prune_epochs}, but there is no sparsity to prune to")
        for name, words in (("optimizer", Optimizer), ("mixed", Mixed), ("keep", Keeping)):
            if getattr(self, name) not in get_args(words):
                raise PlanError(f"finetune: {name} must be one of {get_args(words)}, got {getattr(self, name)!r}")

    def held_out_of(self, examples: int) -> int:
        """How many of so many examples are held out. Raises PlanError if that leaves none to train on."""
        if self.held_out is None:
            return min(_MOST_HELD_OUT, int(_HELD_OUT_SHARE * examples))
        if self.held_out >= max(examples, 1):
            raise PlanError(f"finetune: held_out is {self.held_out} of {examples} examples; leave some to train on")
        return self.held_out


class Epoch(msgspec.Struct, frozen=True):
    """One epoch; number 0 is the net before any."""

    epoch: int
    loss: float | None  # mean over the batches trained on; None for epoch 0
    held_out_loss: float | None  # None where nothing is held out
    held_out_top1: float | None  # percent; None too where the task is no classification
    learning_rate: float | None  # in the last step
    seconds: float


class History(msgspec.Struct):
    """What a stage of training did. JSON-able: `msgspec.to_builtins(history)`."""

    stage: str  # "pruner", "tuner": the class, in lower case
    epochs: int  # that there will be
    held_out: int  # examples
    dense: Epoch | None = None  # the uncompressed net on the held-out examples
    done: list[Epoch] = []
    kept: int = 0  # the epoch whose state was kept

    @property
    def last(self) -> Epoch:
        """The newest record."""
        return self.done[-1]
