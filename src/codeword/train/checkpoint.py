"""The state of a run in one file: tensors in safetensors, all else as JSON in its metadata. No pickle, so no code.

save_state(path, {"net": net.state_dict(), "optimizer": optimizer.state_dict(), ...})      whole or not at all
load_state(path)                                                                           the same again
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from codeword.errors import MismatchError, PlanError, SourceError, WriteError
from codeword.finetune import Finetune
from codeword.nn.state import as_tensor
from codeword.safetensors_file import SafetensorsEntry, read_header, read_tensor, strict_json, write_safetensors
from codeword.sources import open_source
from codeword.train.processes import Process

_FORMAT = "codeword training state 1"
_KEY = "state"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises WriteError if the file cannot be written or a value is of another kind; what was there is then untouched.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _packed(state, "", tensors)
    metadata = {"format": _FORMAT, _KEY: json.dumps(skeleton, separators=(",", ":"))}
    if not tensors:
        write_safetensors(path, [], {}.__getitem__, metadata)
        return
    source = open_source({name: tensor.detach() for name, tensor in tensors.items()})
    write_safetensors(path, [(info.name, info.dtype, info.shape) for info in source.infos], source.load, metadata)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, tensors on the CPU. Raises SourceError if the file is missing, damaged or another's."""
    header = read_header(path)
    if header.metadata.get("format") != _FORMAT or _KEY not in header.metadata:
        found = header.metadata.get("format", "no training state")
        raise SourceError(f"{path} holds {found!r:.100}, not a {_FORMAT!r}; remove it, or name another folder")
    try:
        return _unpacked(strict_json(header.metadata[_KEY].encode(), f"{path}: state"), path, header.entries)
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path}: its state is damaged ({error!r:.200}); remove it and start again") from error


def state_path(folder: Path | str, stage: type) -> Path:
    """Where the state of such a stage is in a folder."""
    return Path(folder) / f"{stage.__name__.lower()}.safetensors"


def check_unused(paths: Iterable[Path], process: Process) -> None:
    """Raises PlanError if there is a state already: what it cost must not be lost by mistake."""
    found = [str(path) for path in paths if path.exists()]
    # The first process's word: by the time another looks, the first may have written already.
    if process.first_says(bool(found)):
        raise PlanError(
            f"there is the state of a run already: {' and '.join(found)}; go on from it with resume=True (--resume), "
            "name another folder, or remove it"
        )


def fingerprint(options: Finetune, state: dict[str, Any], examples: int) -> dict[str, Any]:
    """What makes two runs the same: options, the weights they start from, how much data."""
    tensors = {
        f"{part}/{name}": value
        for part in ("net", "stage")
        for name, value in state[part].items()
        if isinstance(value, Tensor)
    }
    source, digest = open_source(tensors), hashlib.sha256()
    for info in source.infos:
        digest.update(f"{info.name} {info.dtype} {info.shape} ".encode())
        digest.update(np.ascontiguousarray(source.load(info.name)).reshape(-1).view(np.uint8).data)
    return msgspec.to_builtins(options) | {"the net's digest": digest.hexdigest()[:16], "examples": examples}


def check_same_run(path: Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises MismatchError, with both values of each difference, if a state is not of this run."""
    different = [
        f"{name} is {saved.get(name)!r:.80} there and {mine.get(name)!r:.80} here"
        for name in dict.fromkeys((*saved, *mine))
        if saved.get(name) != mine.get(name)
    ]
    if different:
        raise MismatchError(
            f"{path} is of another run: {'; '.join(different)}. Resume with what it was started with, name another "
            "folder, or remove what is there"
        )


def copied(value: Any) -> Any:  # noqa: ANN401
    """A state with tensors of its own, on the CPU."""
    match value:
        case Tensor():
            return value.detach().to("cpu", copy=True)
        case dict():
            return {key: copied(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(copied, value))
        case _:
            return value


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """JSON of a value, its tensors put aside under the names of their places."""
    match value:
        case Tensor():
            while place in tensors:  # keys 0 and "0" are two places of one name
                place += "'"
            tensors[place] = value
            return {"tensor": place}
        case float() if not math.isfinite(value):  # no JSON
            return {"float": repr(value)}
        case None | bool() | int() | float() | str():
            return value
        case dict():
            # Pairs, because the keys of an optimizer's state are numbers, which JSON's are not.
            if not all(isinstance(key, (str, int)) for key in value):
                raise WriteError(f"training state: keys of {place or 'the state'} must be strings or whole numbers")
            return {
                "dict": [[key, _packed(item, f"{place}/{key}".lstrip("/"), tensors)] for key, item in value.items()]
            }
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [_packed(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]}
        case _:
            raise WriteError(
                f"training state: {place} is a {type(value).__name__}; only tensors, numbers, strings, booleans and "
                "None, in dicts, lists and tuples, can be saved"
            )


def _unpacked(value: Any, path: Path, entries: dict[str, SafetensorsEntry]) -> Any:  # noqa: ANN401
    match value:
        case {"tensor": str(place)}:
            return as_tensor(read_tensor(path, entries[place]))
        case {"float": str(text)}:
            return float(text)
        case {"dict": pairs}:
            return {key: _unpacked(item, path, entries) for key, item in pairs}
        case {"list": items}:
            return [_unpacked(item, path, entries) for item in items]
        case {"tuple": items}:
            return tuple(_unpacked(item, path, entries) for item in items)
        case _:
            return value
