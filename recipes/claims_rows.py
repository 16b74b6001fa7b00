"""The rows that `claims.py` runs: of each claim what it says, on which net, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import nn

from codeword import zoo
from codeword.finetune import Finetune
from codeword.methods import (
    Birch,
    DensityKMeans,
    Keep,
    KernelTemplates,
    Lloyd,
    Method,
    ProductQuantization,
    Prune,
    RateAware,
)
from codeword.plan import Plan, Rule
from codeword.train.leaves import Kind
from codeword.train.prune import Criterion, Scope

HERE = Path(__file__).parent


class Net(NamedTuple):
    """A net, its data and its weights, None where they are an argument."""

    factory: Callable[[], nn.Module]
    data: str
    weights: Path | None = None


NETS = {
    "lenet300": Net(zoo.lenet_300_100, "mnist"),
    "lenet5": Net(zoo.lenet5, "mnist", zoo.lenet5_path()),
    "resnet20": Net(zoo.resnet20, "cifar10"),
    "vgg16_32": Net(zoo.vgg16_32, "cifar10"),
    "alexnet32": Net(zoo.alexnet32, "cifar10"),
}


@dataclass(frozen=True)
class Pruned:
    """Pruning before compression: to a share of zeros along a ramp, or at once to the shares of a plan."""

    options: Finetune
    sparsity: float | None = None
    plan: Plan | None = None
    criterion: Criterion = "saliency"
    scope: Scope = "global"
    ramp: float = 0.6  # of the epochs


@dataclass(frozen=True)
class Row:
    """A pipeline: prune while training, compress, train what the file holds; the first and the last may be missing."""

    claim: str
    name: str
    net: str
    how: str
    compress: Method | Plan | str  # a string is a target
    pruned: Pruned | None = None
    tuned: Finetune | None = None
    kinds: tuple[Kind, ...] | None = None  # that train; None: what Tuner chooses
    pace: float | None = None  # of shadows; None: what Tuner chooses
    seeds: tuple[int, ...] = (0, 1, 2)
    ratio: float | None = None  # that new codes bring the file to; None: they keep its size

    def options(self) -> dict[str, Any]:
        """What was asked for, for the record."""
        return {
            "compress": self.compress if isinstance(self.compress, str) else _text(self.compress),
            "pruned": None if self.pruned is None else _changed(self.pruned),
            "tuned": None if self.tuned is None else _changed(self.tuned),
            "kinds": self.kinds,
            "pace": self.pace,
            "trained_to_ratio": self.ratio,
        }


def _text(how: Method | Plan) -> list[dict[str, Any]] | str:
    return how.to_dict()["rule"] if isinstance(how, Plan) else repr(how)


def _changed(options: Pruned | Finetune) -> dict[str, Any]:
    """Options that are not the default."""
    if isinstance(options, Pruned):
        if options.plan is not None:
            return {"plan": options.plan.to_dict()["rule"]} | _changed(options.options)
        kept = {"sparsity": options.sparsity, "criterion": options.criterion, "scope": options.scope}
        return kept | {"ramp": options.ramp} | _changed(options.options)
    default = msgspec.to_builtins(Finetune())
    return {name: value for name, value in msgspec.to_builtins(options).items() if value != default[name]}


NOTES = [
    "top-1 in percent; drop: points below the uncompressed net; ratio: float32 bytes over bytes of the file",
    "the last 5,000 training images are held out: the epoch to keep and all options were chosen by them",
    "resnet20, lenet300, alexnet32 and vgg16_32 were trained on all training images, so all that is held out for them "
    "is known to the net the files start from, and their held-out accuracy reads high; the test images are not",
    "schedules are short, for processors: 6 epochs of pruning and 1 of codewords on MNIST, up to 16 on CIFAR-10; a row "
    "has the seeds that were run, often one, and rows of claims_rows.py that are missing here were not run yet",
    "before_tuning: the file before its codewords were trained; epoch_loss_heldout_seconds: epochs, 0 before any",
]

# MNIST ---------------------------------------------------------------------------------------------------------------

_MNIST = Finetune(epochs=10, learning_rate=1e-3, shift=2, reassign_every=None)
_LABELS = msgspec.structs.replace(_MNIST, distill=0.0)


def _with(options: Finetune, **changes: float | str | None) -> Finetune:
    return msgspec.structs.replace(options, **changes)


_HAN = {net: Plan.load(HERE / f"deep_compression_{net}.toml") for net in ("lenet300", "lenet5")}
_SALIENT = Pruned(_with(_MNIST, epochs=6), 0.97)
_LESS = Pruned(_with(_MNIST, epochs=6), 0.95)
_SETTLED = _with(_MNIST, epochs=1, learning_rate=5e-4)


def _deep_compression(net: str, targets: tuple[str, ...], one_call: tuple[str, ...]) -> list[Row]:
    claim, plan = "deep-compression", _HAN[net]
    pruned = Pruned(_with(_LABELS, epochs=5), plan=plan)
    han = Row(
        claim,
        f"{net}-han",
        net,
        "Han et al. 2016: magnitude pruning at once to their share of zeros in each layer, retrained on labels; "
        "k-means from a linear start; codewords trained on labels with codes fixed; entropy-coded",
        plan,
        pruned,
        _with(_LABELS, epochs=1, learning_rate=3e-4),
    )
    ours = [
        Row(
            claim,
            f"{net}-pruned-{target}",
            net,
            f"ours: pruned as in Han's row, rate-aware at {target}; codewords trained, half by distillation",
            target,
            pruned,
            _SETTLED,
        )
        for target in targets
    ]
    alone = [
        Row(
            claim,
            f"{net}-one-call-{target}",
            net,
            f'ours, one call: compress(model, "{target}", data=..., finetune=Finetune(epochs=6, shift=2))',
            target,
            None,
            Finetune(epochs=6, shift=2),
        )
        for target in one_call
    ]
    return [han, *ours, *alone]


def _fang_and_jia_lenet5() -> list[Row]:
    """Side by side, because they begin with the same pruning."""
    rows = []
    for pruned, birch in ((_SALIENT, Birch(15.0)), (_LESS, Birch(18.0))):
        first = f"pruned by global dynamic saliency to {pruned.sparsity:.0%} zeros while it trains"
        last = "codebooks trained with codes fixed"
        rows += [
            Row(
                "fang",
                f"lenet5-prune-pq-{100 * (pruned.sparsity or 0):.0f}",
                "lenet5",
                f"{first}; product quantization of four weights to 8 bits; {last}",
                Plan.load(HERE / "prune_pq.toml"),
                pruned,
                _SETTLED,
            ),
            Row(
                "jia",
                f"lenet5-birch-{100 * (pruned.sparsity or 0):.0f}",
                "lenet5",
                f"{first}; BIRCH and k-means++ at {birch.sqnr_db:.0f} dB, which find k; {last}",
                birch,
                pruned,
                _SETTLED,
            ),
        ]
    return rows


def _wang_lenet5() -> list[Row]:
    starts: dict[str, Callable[[int], Method]] = {
        "density": DensityKMeans,
        "linear": lambda k: Lloyd(k, "linear"),
        "kmeans++": lambda k: Lloyd(k, "kmeans++"),
    }
    return [
        Row(
            "wang",
            f"lenet5-k{k}-{name}",
            "lenet5",
            f"{k} codewords a tensor from a {name} start, codewords trained for one epoch",
            make(k),
            None,
            _with(_MNIST, epochs=1, learning_rate=5e-4),
        )
        for k in (4, 8, 16)
        for name, make in starts.items()
    ]


# CIFAR-10 ------------------------------------------------------------------------------------------------------------

_CIFAR = Finetune(
    epochs=12, learning_rate=3e-3, optimizer="sgd", distill=1.0, shift=4, mirror=True, reassign_every=20, compile=True
)
_FIXED = _with(_CIFAR, epochs=1, reassign_every=None, compile=False)
_LONGER = _with(_CIFAR, epochs=6, reassign_every=None)
_FACTORS: tuple[Kind, ...] = ("scale", "gain", "offset", "raw")


def _on_convs(method: Method, *, first: bool = False) -> Plan:
    """A plan for ResNet-20: the method for its convolutions, rate-aware for the last layer and, unless first, conv1."""
    rules = [Rule("linear.weight", RateAware(0.02))]
    if not first:
        rules.append(Rule("conv1.weight", RateAware(0.004)))
    return Plan((*rules, Rule("*conv*.weight", method), Rule("*", Keep(4))))


def _birch_planned() -> Plan:
    """BIRCH in each layer of ResNet-20, at 2.8 times about the lambdas that a plan to 15x has, by stage."""
    lambdas = {
        "layer1.*conv*": 0.015,
        "layer2.0.conv1*": 0.027,
        "layer2.*conv*": 0.064,
        "layer3.0.conv1*": 0.09,
        "layer3.2.conv2*": 0.7,
        "layer3.*conv*": 0.17,
    }
    by_stage = [Rule(f"{stage}.weight", RateAware(lam, start=Birch(18.0))) for stage, lam in lambdas.items()]
    ends = Rule("linear.weight", RateAware(0.002)), Rule("conv1.weight", RateAware(0.0006))
    return Plan((*ends, *by_stage, Rule("*", Keep(4))))


def _resnet20() -> list[Row]:
    trained = "then codewords and weights trained by distillation, codes taken anew"
    lengths = ("", "", _CIFAR), ("-short", ", for one epoch", _with(_CIFAR, epochs=1, compile=False))
    trains: list[tuple[str, str, int, tuple[Kind, ...]]] = [
        ("", "", 6, ()),
        ("-too", " and the templates", 14, ("codebook",)),
    ]
    templates = (
        "kernels as a * template + b, 1,024 templates of all layers together, a and b in 8 bits; a, b, norms and "
    )
    return [
        *(
            Row(
                "chen",
                f"resnet20-templates{mark}",
                "resnet20",
                f"{templates}biases{words} trained by distillation",
                _on_convs(KernelTemplates(1024, drop_offset=False, shared="all"), first=True),
                None,
                _with(_LONGER, epochs=epochs, learning_rate=5e-3),
                (*_FACTORS, *more),
            )
            for mark, words, epochs, more in trains
        ),
        Row(
            "jia",
            "resnet20-pruned-70",
            "resnet20",
            "pruned by global dynamic saliency to 70 % zeros while it trains by distillation; nothing else",
            Keep(),
            Pruned(_with(_LONGER, epochs=10, learning_rate=1e-2), 0.7),
        ),
        Row(
            "jia",
            "resnet20-birch",
            "resnet20",
            "pruned by global dynamic saliency to 50 % zeros while it trains; BIRCH and k-means++ at 18 dB, which find "
            f"k; {trained}, at error and bits, to 15.2x",
            Plan((Rule("linear.weight", Birch(18.0)), Rule("*conv*.weight", Birch(18.0)), Rule("*", Keep(4)))),
            Pruned(_with(_LONGER, epochs=4, learning_rate=5e-3), 0.5),
            _CIFAR,
            pace=1.0,
            ratio=15.2,
        ),
        Row(
            "jia",
            "resnet20-birch-planned",
            "resnet20",
            "BIRCH and k-means++ at 18 dB, which find k; rate-aware from there, which prunes, at what the planner pays "
            f"for a bit in each stage of the net; {trained}, on images mixed in pairs",
            _birch_planned(),
            None,
            _with(_CIFAR, blend=True),
            pace=1.0,
        ),
        *(
            Row(
                "fang",
                f"resnet20-ours-23x{mark}",
                "resnet20",
                f"ours: rate-aware at 23x, {trained}{words}",
                "23x",
                None,
                options,
                pace=1.0,
            )
            for mark, words, options in (
                *lengths,
                ("-blended", ", on images mixed in pairs", _with(_CIFAR, epochs=16, blend=True)),
            )
        ),
        Row(
            "fang",
            "resnet20-ours-vectors",
            "resnet20",
            f"ours: rate-aware from product quantization of two weights, {trained}",
            _on_convs(RateAware(0.31, start=ProductQuantization(2, 64))),
            None,
            _CIFAR,
            pace=1.0,
        ),
        *(
            Row(
                "fang",
                f"resnet20-prune-pq{mark}",
                "resnet20",
                "vectors of three weights pruned at once to 75 % zeros, product quantization of them to 64 codewords; "
                f"{trained}{words}",
                _on_convs(Prune(0.75, ProductQuantization(3, 64), "block 1x3")),
                None,
                options,
                pace=1.0,
            )
            for mark, words, options in lengths
        ),
    ]


def _vgg() -> list[Row]:
    plan = Plan(
        (
            Rule("fc.weight", RateAware(0.02)),
            Rule("conv*.weight", KernelTemplates(1024, drop_offset=False, shared="all")),
            Rule("*", Keep(7)),
        )
    )
    return [
        Row(
            "chen",
            "vgg16_32-templates",
            "vgg16_32",
            "kernels as a * template + b, 1,024 templates of all layers together, a and b in 8 bits; a, b, norms and "
            "biases trained by distillation",
            plan,
            None,
            _with(_LONGER, epochs=3, learning_rate=5e-3, compile=False, shift=2),
            _FACTORS,
            seeds=(0,),
        )
    ]


def _alexnet32() -> list[Row]:
    pruned = Pruned(_with(_FIXED, epochs=2, learning_rate=5e-3, shift=2), 0.9)
    tuned = _with(_FIXED, shift=2)
    first = "pruned by global dynamic saliency to 90 % zeros while it trains, two epochs"
    last = "trained by distillation for one more, codes fixed"
    return [
        Row(
            "fang",
            "alexnet32-prune-pq",
            "alexnet32",
            f"{first}; product quantization of four weights to 8 bits, codebooks {last}",
            Plan.load(HERE / "prune_pq.toml"),
            pruned,
            tuned,
            seeds=(0,),
        ),
        Row(
            "fang",
            "alexnet32-ours-100x",
            "alexnet32",
            f"ours: {first}; rate-aware at 100x, codewords {last}",
            "100x",
            pruned,
            tuned,
            seeds=(0,),
        ),
    ]


def _wang_resnet20() -> list[Row]:
    starts: dict[str, Method] = {
        "density": DensityKMeans(8),
        "linear": Lloyd(8, "linear"),
        "kmeans++": Lloyd(8, "kmeans++"),
    }
    return [
        Row(
            "wang",
            f"resnet20-k8-{name}",
            "resnet20",
            f"8 codewords a tensor from a {name} start, codewords trained for one epoch",
            method,
            None,
            _FIXED,
        )
        for name, method in starts.items()
    ]


ROWS: list[Row] = [
    *_deep_compression("lenet300", ("60x", "80x"), ("50x", "60x")),
    *_deep_compression("lenet5", ("80x", "120x"), ("50x", "60x", "100x")),
    *_fang_and_jia_lenet5(),
    *_wang_lenet5(),
    *_resnet20(),
    *_vgg(),
    *_alexnet32(),
    *_wang_resnet20(),
]
