"""What else there is: other tools' ways to make a net small without retraining, counted in one place.

Every peer is counted kindly: no header, no names, no checksums; tables, scales, norms and biases in float16; codes
either bit-packed ("packed") or under xz -9e ("xz", what a zip of the file would give and a little better), in
whichever of two layouts that makes shorter. Weights are those that the stored codes and float16 tables decode to.
Peers that are not installed are told, never an error.
"""

from __future__ import annotations

import copy
import io
import logging
import lzma
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from codeword.data import Dataset

if TYPE_CHECKING:
    from torch import nn

Weights: TypeAlias = dict[str, np.ndarray]  # float32

DEFAULT_LEAST = 2048  # coremltools' weight_threshold: smaller tensors are not compressed
_GROUP = 8  # output channels that share a table, where a peer has tables for groups


class Packed(NamedTuple):
    """A compressed net: its weights as they decode, and what is stored."""

    weights: Weights
    codes: list[tuple[np.ndarray, int]]  # uint8 values and the bits each needs
    side: list[np.ndarray]  # float16


Make: TypeAlias = Callable[[], Packed]
Settings: TypeAlias = Iterator[tuple[str, Make]]  # how a setting is called, and what makes it

CODERS: dict[str, Callable[[bytes], bytes]] = {
    "packed": lambda data: data,
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def sizes(packed: Packed, coders: Mapping[str, Callable[[bytes], bytes]] = CODERS) -> dict[str, int]:
    """Bytes under each coder: of codes bit-packed or a byte each, of float16 as it is or in byte planes."""
    dense = b"".join(bit_packed(codes, bits) for codes, bits in packed.codes)
    loose = b"".join(codes.tobytes() for codes, _ in packed.codes)
    side = b"".join(values.tobytes() for values in packed.side)
    planes = np.frombuffer(side, np.uint8).reshape(-1, 2).T.tobytes()
    return {
        name: min(len(coder(dense)), len(coder(loose))) + min(len(coder(side)), len(coder(planes)), len(side))
        for name, coder in coders.items()
    }


def bit_packed(codes: np.ndarray, bits: int) -> bytes:
    """uint8 codes in `bits` bits each."""
    return np.packbits(np.unpackbits(codes.reshape(-1, 1), axis=1)[:, 8 - bits :]).tobytes()


def half(values: np.ndarray) -> np.ndarray:
    """To float16."""
    return values.astype(np.float16)


class Subject:
    """A net that peers are tried on. example: an input (1, ...), to trace it by. calibration: labelled examples."""

    def __init__(self, net: nn.Module, example: np.ndarray | None = None, calibration: Dataset | None = None) -> None:
        self.net = net
        self.example = example
        self.calibration = calibration
        seen: set[int] = set()
        self.weights: Weights = {}
        for name, tensor in net.state_dict().items():
            # Tied weights are stored once; whole numbers, such as BatchNorm's counter, are given to peers for nothing.
            if tensor.is_floating_point() and (tensor.data_ptr() not in seen or not tensor.numel()):
                seen.add(tensor.data_ptr())
                self.weights[name] = tensor.detach().float().cpu().numpy()

    def copy(self) -> nn.Module:
        """A net that a peer may change."""
        return copy.deepcopy(self.net).cpu().eval()

    @cached_property
    def fisher(self) -> str:
        """Path of what coremltools measures with labelled examples, one at a time: squared gradients of the loss."""
        import torch

        theirs = import_module("coremltools.optimize.torch.palettization")
        data = self.calibration
        if data is None:
            raise AssertionError("a peer that needs data was tried without")  # pragma: no cover - `why_not` says so
        self._folder = tempfile.TemporaryDirectory()
        path = str(Path(self._folder.name) / "fisher.pt")
        batches = [(torch.from_numpy(data.x[i : i + 1]), torch.from_numpy(data.y[i : i + 1])) for i in range(len(data))]
        config = theirs.SKMPalettizerConfig.from_dict(
            {"global_config": {"n_bits": 4}, "calibration_nsamples": len(data)}
        )
        theirs.SKMPalettizer(self.copy(), config).compute_sensitivity(batches, _loss, sensitivity_path=path)
        return path


def _loss(net: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - tensors
    from torch.nn.functional import cross_entropy

    return cross_entropy(net(batch[0]), batch[1])


@dataclass(frozen=True, slots=True)
class Peer:
    """One tool, or one of its ways."""

    label: str
    settings: Callable[[Subject], Settings]
    package: str | None = None  # that it needs
    needs_data: bool = False

    def why_not(self, subject: Subject) -> str | None:
        """Why it cannot be tried here, if it cannot."""
        if self.package is not None and find_spec(self.package) is None:
            return f"not installed (pip install {self.package})"
        return "needs calibration data" if self.needs_data and subject.calibration is None else None


@contextmanager
def hushed() -> Iterator[None]:
    """Nothing of what another's code logs, warns of and prints."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# Rounding


def by_rows(weights: Weights, least: int, code: Callable[[np.ndarray], Packed]) -> Packed:
    """Every matrix of at least so many values by its rows under `code`, the rest in float16."""
    out = Packed({}, [], [])
    for name, value in weights.items():
        if value.ndim < 2 or value.size < least:
            out.side.append(half(value))
            out.weights[name] = half(value).astype(np.float32)
            continue
        part = code(value.reshape(len(value), -1))
        out.codes.extend(part.codes)
        out.side.extend(part.side)
        out.weights[name] = part.weights[""].reshape(value.shape)
    return out


def uniform(rows: np.ndarray, bits: int, clip: bool) -> Packed:
    """Symmetric rounding, a float16 scale for each row: of its largest weight or, with clip, of least squared error."""
    top = 2 ** (bits - 1) - 1
    best, least = np.ones((len(rows), 1), np.float32), np.full((len(rows), 1), np.inf)
    for share in np.linspace(0.3, 1, 71) if clip else (1.0,):
        scale = half(np.maximum(share * np.abs(rows).max(1, keepdims=True) / top, 2.0**-24)).astype(np.float32)
        error = np.square(np.clip(np.rint(rows / scale), -top, top) * scale - rows).sum(1, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    codes = np.clip(np.rint(rows / best), -top, top)
    return Packed({"": (codes * best).astype(np.float32)}, [((codes + top).astype(np.uint8), bits)], [half(best)])


def nf4(rows: np.ndarray, block: int = 64) -> Packed:
    """NormalFloat4 of QLoRA (Dettmers et al. 2023): 16 quantiles of a normal, a float16 maximum for each block."""
    quantile, end = NormalDist().inv_cdf, 0.9677083
    up = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    down = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    levels = np.array(sorted([*down, 0.0, *up]), np.float32) / np.float32(max(up))
    flat = rows.reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    scale = half(np.abs(blocks).max(1, keepdims=True))
    scaled = blocks / np.maximum(scale.astype(np.float32), 2.0**-24)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, scaled).astype(np.uint8)
    dense = (levels[codes] * scale.astype(np.float32)).reshape(-1)[: flat.size]
    return Packed({"": dense}, [(codes.reshape(-1)[: flat.size], 4)], [scale])


def _float16(subject: Subject) -> Settings:
    yield "", partial(by_rows, subject.weights, 1 << 62, nf4)  # no tensor is so large: nothing is coded


def _uniform(subject: Subject) -> Settings:
    for clip, widths in ((False, (3, 4, 5, 6, 7, 8)), (True, (2, 3, 4, 5, 6))):
        for bits in widths:
            scale = "least error" if clip else "the largest"
            code = partial(uniform, bits=bits, clip=clip)
            yield f"int{bits} a channel, scale of {scale}", partial(by_rows, subject.weights, 0, code)


def _nf4(subject: Subject) -> Settings:
    yield "blocks of 64", partial(by_rows, subject.weights, 0, nf4)


# coremltools


def palettized(
    subject: Subject,
    bits: int,
    *,
    group: int | None = None,
    scale: bool = False,
    dim: int = 1,
    least: int = DEFAULT_LEAST,
    sensitive: bool = False,
) -> Packed:
    """coremltools' palettizers, their tables and scales rounded to float16 as a Core ML file holds them.

    group: output channels that share a table, or as many fewer as divide a layer's; None for one table a tensor. scale:
    channels are scaled first. dim: of vectors. least: weights of a layer that is compressed. sensitive: k-means weighs
    errors by labelled data (SKM, after SqueezeLLM).
    """
    import torch

    theirs = import_module("coremltools.optimize.torch.palettization")
    layers = {name.removesuffix(".weight"): value for name, value in subject.weights.items() if value.ndim > 1}
    chosen = {}
    for layer, value in layers.items():
        if value.size >= least:
            share = None if group is None else max(n for n in range(1, group + 1) if len(value) % n == 0)
            chosen[layer] = {
                "n_bits": bits,
                "granularity": "per_tensor" if share is None else "per_grouped_channel",
                "group_size": share,
                "enable_per_channel_scale": scale,
                "cluster_dim": None if dim == 1 else dim,
            }
    torch.manual_seed(0)  # of vectors only
    if sensitive:
        config = theirs.SKMPalettizerConfig.from_dict({"module_name_configs": chosen})
        net = theirs.SKMPalettizer(subject.copy(), config).compress(sensitivity_path=subject.fisher)
    else:
        config = theirs.PostTrainingPalettizerConfig.from_dict({"module_name_configs": chosen})
        net = theirs.PostTrainingPalettizer(subject.copy(), config).compress()
    state = net.state_dict()
    out = Packed({}, [], [])
    for name, value in subject.weights.items():
        layer = name.removesuffix(".weight")
        table = state.get(f"{layer}._COREML_/weight/lut") if name.endswith(".weight") else None
        if table is None:
            out.side.append(half(value))
            out.weights[name] = half(value).astype(np.float32)
            continue
        clustered = state[name].numpy().astype(np.float32)
        key = f"{layer}._COREML_/weight/palettization_scale"
        scales = half(state[key].numpy().reshape(-1, 1)) if scale else None
        if scales is not None:
            out.side.append(scales)
            clustered = clustered.reshape(len(value), -1) / scales.astype(np.float32)
        books = half(table.numpy().reshape(-1, 2**bits, dim))
        vectors = clustered.reshape(len(books), -1, dim, value[0].size).swapaxes(2, 3)  # along output channels
        codes, dense = np.empty(vectors.shape[:3], np.uint8), np.empty(vectors.shape, np.float32)
        for i, book in enumerate(books.astype(np.float32)):
            distance = np.zeros((*vectors.shape[1:3], len(book)), np.float32)
            for d in range(dim):
                distance += np.square(vectors[i, :, :, d, None] - book[:, d])
            codes[i] = distance.argmin(2)
            dense[i] = book[codes[i]]
        dense = dense.swapaxes(2, 3).reshape(len(value), -1)
        out.codes.append((codes, bits))
        out.side.append(books)
        out.weights[name] = (dense if scales is None else dense * scales.astype(np.float32)).reshape(value.shape)
    return out


def _palettized(subject: Subject, *, sensitive: bool) -> Settings:
    for group, scale, widths in (
        (None, False, (1, 2, 3, 4, 6, 8)),
        (_GROUP, False, (1, 2, 3, 4, 6)),
        (None, True, () if sensitive else (2, 3, 4, 6)),
    ):
        for bits in widths:
            table = "a tensor" if group is None else f"{group} channels"
            name = f"{bits} bits, a table for {table}{', channel scales' if scale else ''}"
            yield name, partial(palettized, subject, bits, group=group, scale=scale, sensitive=sensitive)


# NNCF


def nncf_rounded(subject: Subject, mode: str) -> Packed:
    """NNCF's weight compression for torch, by the name of one of its modes; 4 bits it has for linear layers only."""
    import torch

    nncf = import_module("nncf")
    four = {"group_size": -1, "all_layers": True} if mode.startswith("int4") else {}
    example = None if subject.example is None else torch.from_numpy(subject.example)
    net = nncf.compress_weights(
        subject.copy(), mode=nncf.CompressWeightsMode(mode), dataset=nncf.Dataset([example]), **four
    )
    state, modules = net.state_dict(), dict(net.named_modules())
    unpack = {  # "__nncf_hooks.post_hooks.layer1:0:conv1:weight__0.0" decompresses layer1.0.conv1.weight
        name.rpartition(".post_hooks.")[2].rpartition("__")[0].replace(":", "."): module
        for name, module in modules.items()
        if hasattr(module, "_scale")
    }
    out = Packed({}, [], [])
    for name, value in subject.weights.items():
        if name not in unpack:
            out.side.append(half(value))
            out.weights[name] = half(value).astype(np.float32)
            continue
        with torch.no_grad():
            out.weights[name] = unpack[name](state[name]).float().numpy().reshape(value.shape)
        for kind, array in [("codes", state[name]), *unpack[name].named_buffers()]:
            stored = array.numpy()
            if stored.dtype == np.float16:
                out.side.append(stored)
            elif kind == "codes" and stored.size < value.size:  # two in a byte
                flat = stored.view(np.uint8).reshape(-1)
                out.codes.append((np.stack([flat & 15, flat >> 4], 1).reshape(-1)[: value.size], 4))
            elif np.issubdtype(stored.dtype, np.integer) and stored.itemsize == 1:
                out.codes.append((stored.view(np.uint8), 8))
    return out


def _nncf(subject: Subject) -> Settings:
    for mode in ("int8_sym", "int8_asym", "int4_sym", "int4_asym"):
        yield mode, partial(nncf_rounded, subject, mode)


PEERS: dict[str, Peer] = {
    "float16": Peer("float16", _float16),
    "uniform": Peer("rounding a channel", _uniform),
    "nf4": Peer("NF4", _nf4),
    "coremltools": Peer("coremltools k-means", partial(_palettized, sensitive=False), "coremltools"),
    "coremltools-skm": Peer("coremltools SKM", partial(_palettized, sensitive=True), "coremltools", needs_data=True),
    "nncf": Peer("NNCF", _nncf, "nncf"),
}
