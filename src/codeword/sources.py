"""Checkpoints in, tensors out: what a network holds, read without loading it, and one tensor at a time after that.

    open_source(what) -> Source        what: .safetensors (one file, or shards with an index), a torch checkpoint,
                                       a live torch.nn.Module, a mapping of arrays or tensors

A Source says what there is (`infos`) and gives the values (`load`). Files are only ever read as data: a pickle that
wants to run code is refused. torch is imported for torch's own checkpoints and nothing else.
"""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from codeword.artifact.layout import MAGIC
from codeword.errors import ExprError, MissingDependencyError, SourceError
from codeword.expr import DTYPES, FLOATS, dense_nbytes, dtype_name
from codeword.safetensors_file import SafetensorsEntry, read_header, read_tensor, strict_json

if TYPE_CHECKING:
    import torch

Kind: TypeAlias = Literal["linear", "conv", "embedding", "norm", "bias", "other"]
_Described: TypeAlias = tuple[tuple[int, ...], str]  # shape, dtype name
INDEX_SUFFIX = ".safetensors.index.json"
# Where training scripts keep the weights inside a checkpoint, the likeliest name first.
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "ema",
    "model_ema",
)
# Wrappers that put their own name before every other: DataParallel and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_READS = f"Codeword reads .safetensors, *{INDEX_SUFFIX} and torch checkpoints"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before its values are read.

    dtype is a key of `expr.DTYPES`. tied_to names the earlier tensor whose memory this one shares, if any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    tied_to: str | None = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def dense_nbytes(self) -> int:
        """Bytes uncompressed, as `expr.dense_nbytes` counts."""
        return dense_nbytes(self.dtype, self.size)


@runtime_checkable
class Source(Protocol):
    """Anything tensors can be read from. Those that `open_source` makes of files pickle as their path."""

    @property
    def location(self) -> str:
        """Where the tensors come from, for messages."""
        ...

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Every tensor, in the source's own order, which is the same each time."""
        ...

    def load(self, name: str) -> np.ndarray:
        """Values of one tensor, C order, of the shape and dtype its info says; perhaps read-only, never to be changed.

        Raises SourceError if there is no such tensor or its values cannot be read.
        """
        ...


def open_source(what: Any) -> Source:  # noqa: ANN401
    """The tensors of a path, a torch.nn.Module or a mapping name -> array; a Source is returned as it is.

    Raises SourceError if it cannot be read safely or whole, or holds no tensors; MissingDependencyError if it needs
    torch and torch is not installed.
    """
    if isinstance(what, Source):
        return what
    if isinstance(what, (str, os.PathLike)):
        return _open_path(Path(os.fsdecode(what)))
    torch = sys.modules.get("torch")  # who has a module or a tensor in hand has imported torch
    if torch is not None and isinstance(what, torch.nn.Module):
        return _Memory(f"{type(what).__name__} module", _weights(what.state_dict()), _module_kinds(what))
    if isinstance(what, Mapping):
        return _Memory("mapping", what)
    raise SourceError(f"cannot read tensors from a {type(what).__name__}; give a path, a torch.nn.Module or a mapping")


def files_of(source: Source) -> tuple[Path, ...]:
    """The files that a source reads from, none if its tensors are in memory: what no output may replace."""
    return source.files if isinstance(source, (_Safetensors, _Checkpoint)) else ()


def _open_path(path: Path) -> Source:
    if not path.exists():
        raise SourceError(f"{path} does not exist; check the path")
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise SourceError(f"{path} is a device or pipe; save the checkpoint to a file first")
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error
    if not head:
        raise SourceError(f"{path} is empty; fetch or save it again")
    if head == MAGIC or path.suffix == ".cw":
        raise SourceError(f"{path} is compressed already; decompress it first: codeword decompress {path}")
    if path.name.endswith((INDEX_SUFFIX, ".safetensors")):
        return _Safetensors(path)
    return _Checkpoint(path, is_zip=head.startswith(b"PK\x03\x04"))


def _in_folder(folder: Path) -> Path:
    """The one index, or without any the one .safetensors file, of a folder as model hubs lay it out."""
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"no *{INDEX_SUFFIX} and no .safetensors file"
        raise SourceError(f"{folder} is a folder with {names}; name the one file to read")
    return found[0]


class _Safetensors:
    """One .safetensors file, or the shards of one index: headers in memory, values in the files."""

    def __init__(self, path: Path) -> None:
        self.location = str(path)
        self._places: dict[str, tuple[Path, SafetensorsEntry]] = {}
        shard_of = _weight_map(path) if path.name.endswith(INDEX_SUFFIX) else {}
        for file in sorted({path.parent / shard for shard in shard_of.values()}) or [path]:
            if not file.is_file():
                raise SourceError(f"{path}: shard {file.name} is missing; fetch the whole checkpoint into this folder")
            for name, entry in read_header(file).entries.items():
                place = self._places.setdefault(name, (file, entry))
                if place[0] != file:
                    shards = f"{place[0].name} and {file.name}"
                    raise SourceError(f"{path}: tensor {name!r} is in two shards, {shards}; save the checkpoint again")
        for name, shard in shard_of.items():
            if name not in self._places or self._places[name][0].name != shard:
                raise SourceError(f"{path}: tensor {name!r} is not in shard {shard}; fetch or save the shards again")
        self.files = tuple(sorted({path, *(file for file, _ in self._places.values())}))
        described = {name: (entry.shape, entry.dtype) for name, (_, entry) in self._places.items()}
        self.infos = _infos(self.location, described, {}, {})

    def load(self, name: str) -> np.ndarray:
        if name not in self._places:
            raise SourceError(f"{self.location} has no tensor {name!r}")
        return read_tensor(*self._places[name])

    def __reduce__(self) -> tuple[Any, ...]:
        return open_source, (self.location,)


def _weight_map(index: Path) -> dict[str, str]:
    """tensor name -> shard file name of an index. Raises SourceError if it is not that, or names another folder."""
    content = strict_json(index.read_bytes(), str(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map (tensor name -> shard file); fetch or save it again")
    for name, shard in weight_map.items():
        # A shard is a file beside its index: an index from a stranger must not make us open any other.
        if not isinstance(shard, str) or shard in ("", "..") or shard != Path(shard).name:
            raise SourceError(f"{index}: shard of tensor {name!r} must be a file in this folder, got {shard!r:.100}")
    return weight_map


class _Memory:
    """A mapping name -> NumPy array or torch tensor. `kinds` are facts that go before what names and shapes suggest."""

    def __init__(self, location: str, tensors: Mapping[Any, Any], kinds: Mapping[str, Kind] | None = None) -> None:
        self.location = location
        self._tensors = tensors
        described: dict[str, _Described] = {}
        first: dict[object, str] = {}
        ties: dict[str, str] = {}
        for name, value in tensors.items():
            if not isinstance(name, str):
                raise SourceError(f"{location}: names of tensors must be strings, got {name!r:.100}")
            described[name] = _describe(value, f"{location}: tensor {name!r}")
            memory = _memory_of(value)
            if memory is not None and first.setdefault(memory, name) != name:
                ties[name] = first[memory]
        self.infos = _infos(location, described, kinds or {}, ties)

    def load(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise SourceError(f"{self.location} has no tensor {name!r}")
        value = self._tensors[name]
        array = _to_numpy(value) if _is_tensor(value) else np.asarray(value, DTYPES[dtype_name(value.dtype)], order="C")
        # A view that cannot be written: the values may still be those of the caller's own network.
        array = array.view()
        array.flags.writeable = False
        return array


class _Checkpoint(_Memory):
    """A file that torch.save wrote; torch maps its tensors where the file is a zip archive, and else holds them all."""

    def __init__(self, path: Path, *, is_zip: bool) -> None:
        content = _torch_load(path, mmap=is_zip)
        found = _state_dict(content)
        if found is None:
            keys = f" with keys {list(content)[:20]!r:.500}" if isinstance(content, Mapping) else ""
            raise SourceError(
                f"{path}: no state dict found, only a {type(content).__name__}{keys}; weights are looked for at "
                f"the top and under {', '.join(_NESTED)}. Save them alone: torch.save(model.state_dict(), PATH)"
            )
        self.files = (path,)
        super().__init__(str(path), _unwrapped(found))

    def __reduce__(self) -> tuple[Any, ...]:
        return open_source, (self.location,)


def _torch_load(path: Path, *, mmap: bool) -> object:
    """What torch.save put in a file, tensors and plain containers only. Raises SourceError; never runs code from it."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f'{path}: reading a torch checkpoint needs PyTorch: pip install "codeword[torch]" ({_READS})'
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle's version and on classes torch renamed: nothing to act on
            return torch.load(str(path), weights_only=True, map_location="cpu", mmap=mmap)
    # Damaged files end in any of Python's exceptions (KeyError, struct.error, EOFError...): torch checks nothing first.
    except Exception as error:
        # torch's own message advises weights_only=False, which is the way into the trap.
        refused = re.search(r"GLOBAL ([\w.]*\w)", str(error))
        if refused:
            raise SourceError(
                f"{path} is a pickle that calls {refused[1]}, which could run any code; refused, nothing was run. "
                "Where you trust it, save the weights alone: torch.save(model.state_dict(), PATH)"
            ) from error
        said = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        reason = (said[1] if said else next(iter(str(error).splitlines()), ""))[:150]
        raise SourceError(
            f"{path} is damaged or not a torch checkpoint ({type(error).__name__}: {reason}); "
            f"fetch or save it again. {_READS}"
        ) from error


def _state_dict(content: object, depth: int = 3) -> dict[str, Any] | None:
    """The first mapping whose values are tensors: `content` itself, or one under a name in `_NESTED`, depth first."""
    if not isinstance(content, Mapping) or depth == 0:  # a pickle may hold a mapping that contains itself
        return None
    weights = _weights(content)
    if weights and all(map(_is_tensor, weights.values())):
        return weights
    nested = (_state_dict(content[name], depth - 1) for name in _NESTED if name in content)
    return next((found for found in nested if found is not None), None)


def _weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the entries by which modules may add any object to it."""
    return {name: value for name, value in state_dict.items() if not str(name).endswith("_extra_state")}


def _unwrapped(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors without the prefixes that wrappers put before every name."""
    for prefix in _WRAPPERS * 2:
        if all(isinstance(name, str) and name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _describe(value: Any, where: str) -> _Described:  # noqa: ANN401
    """Shape and dtype name of an array or tensor. Raises SourceError, begun with `where`, for what cannot be stored."""
    if isinstance(value, np.ndarray):
        try:
            return value.shape, dtype_name(value.dtype)
        except ExprError as error:
            raise SourceError(f"{where}: {error}") from error
    if not _is_tensor(value):
        raise SourceError(f"{where} must be a NumPy array or a torch tensor, got {type(value).__name__}")
    import torch

    if torch.nn.parameter.is_lazy(value):
        raise SourceError(f"{where} has no shape yet; run the model once on an input first")
    if value.is_meta:
        raise SourceError(f"{where} is on the meta device and has no values; load the weights first")
    if value.is_nested or value.layout != torch.strided:
        raise SourceError(f"{where} is sparse or nested ({value.layout}); convert it first: tensor.to_dense()")
    name = _torch_dtype(value)
    if name not in DTYPES:
        way_out = "dequantize it first" if value.is_quantized else "convert it first"
        raise SourceError(f"{where} is {name}, Codeword knows {', '.join(DTYPES)}; {way_out}")
    return tuple(value.shape), name


def _torch_dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return "float8_e4m3" if name == "float8_e4m3fn" else name


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values in NumPy, C order; shares memory with a contiguous CPU tensor."""
    import torch

    # Bytes by way of uint8: torch gives NumPy no bfloat16 or float8.
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().view(DTYPES[_torch_dtype(tensor)]).reshape(tuple(tensor.shape))


def _memory_of(value: Any) -> object | None:  # noqa: ANN401
    """What two tensors have in common when one is the other; None if it has no memory to share."""
    if not _is_tensor(value) or value.numel() == 0:
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _infos(
    location: str, described: Mapping[str, _Described], kinds: Mapping[str, Kind], ties: Mapping[str, str]
) -> tuple[TensorInfo, ...]:
    """Infos of described tensors. Raises SourceError if there are none."""
    if not described:
        raise SourceError(f"{location} holds no tensors; there is nothing to compress")
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (shape, _) in described.items():
        owner, _, leaf = name.rpartition(".")
        modules.setdefault(owner, {})[leaf] = shape
    infos: list[TensorInfo] = []
    for name, (shape, dtype) in described.items():
        known = kinds.get(name) if dtype in FLOATS else None
        kind = known or kind_of(name, shape, dtype, modules[name.rpartition(".")[0]])
        infos.append(TensorInfo(name, shape, dtype, kind, ties.get(name)))
    return tuple(infos)


def kind_of(name: str, shape: tuple[int, ...], dtype: str, siblings: Mapping[str, tuple[int, ...]]) -> Kind:
    """What a tensor does in its network, guessed from its name and shape.

    siblings: last part of the name -> shape, of all tensors of the same module (itself included): the bias beside a
    weight of one axis, or beside running statistics, belongs to a normalisation.
    """
    if dtype not in FLOATS:
        return "other"
    if len(shape) >= 3:
        return "conv"
    # The module's own name and the tensor's: a linear layer inside "time_embedding" is no embedding.
    near = ".".join(name.lower().split(".")[-2:])
    if len(shape) == 2:
        return "embedding" if any(word in near for word in ("embed", "wte", "wpe", "tok_")) else "linear"
    if len(shape) == 0:
        return "other"
    leaf = name.rpartition(".")[2]
    words = {word.strip("0123456789") for word in re.split(r"[._]", near)}
    is_norm = "norm" in near or not words.isdisjoint({"bn", "ln", "gn"}) or "running_var" in siblings
    if is_norm or leaf in ("weight", "running_mean", "running_var"):
        return "norm"
    if "bias" in leaf:
        return "norm" if leaf == "bias" and len(siblings.get("weight", ())) == 1 else "bias"
    return "other"


def _module_kinds(model: torch.nn.Module) -> dict[str, Kind]:
    """Kinds by tensor name, as far as module types tell them."""
    from torch import nn

    kinds: dict[str, Kind] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        place = f"{prefix}." if prefix else ""
        kinds |= {place + name: "other" for name, _ in module.named_buffers(recurse=False)}
        match module:
            case nn.Linear() | nn.Bilinear():
                kinds[place + "weight"] = "linear"
            case nn.modules.conv._ConvNd():
                kinds[place + "weight"] = "conv"
            case nn.Embedding() | nn.EmbeddingBag():
                kinds[place + "weight"] = "embedding"
            case nn.modules.batchnorm._NormBase() | nn.LayerNorm() | nn.GroupNorm() | nn.RMSNorm():
                kinds |= {place + name: "norm" for name in ("weight", "bias", "running_mean", "running_var")}
    return kinds
