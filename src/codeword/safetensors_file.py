"""Read and write .safetensors files, one tensor at a time.

The format: 8 bytes (little endian) with the length of a JSON header, the header, then the tensors without a gap:

    {"__metadata__": {str: str}, NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

Why not the safetensors package: its NumPy side has no bfloat16 or float8 unless torch is there too; it maps the file,
so every page that was read counts as memory of ours; and it writes only a dict that already holds all tensors. Here
reading costs the one tensor asked for and so does writing. The tests hold both sides against that package.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codeword import atomic
from codeword.errors import SourceError, WriteError
from codeword.expr import DTYPES

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
    "float8_e4m3": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_NAMES = {code: name for name, code in _CODES.items()}
_MAX_RANK = 64  # NumPy's own limit
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """Where a tensor lies: dtype is a key of `expr.DTYPES`; start and end are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Entries by name, in the order of their bytes in the file, and the free text the writer left."""

    entries: dict[str, SafetensorsEntry]
    metadata: dict[str, str]


def strict_json(data: bytes, where: str) -> Any:  # noqa: ANN401
    """JSON with what the `json` module lets through refused: duplicate keys, NaN, lone surrogates in keys.

    Raises SourceError that begins with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            key.encode()  # a lone surrogate cannot be printed or written later
            if key in found:
                raise ValueError(f"key {key!r} appears twice")
            found[key] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not valid JSON: {error}; the file is damaged, fetch or save it again") from error


def read_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """The checked header of a .safetensors file: after this every entry can be read.

    Raises SourceError if the file is missing or truncated, the header is not what the format says, or a dtype is one
    that Codeword does not know.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise SourceError(f"{path}: {size} bytes, but a safetensors file begins with 8; fetch or save it again")
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, size - 8):
                raise SourceError(
                    f"{path}: header of {length} bytes in a file of {size} (at most {MAX_HEADER}): "
                    "truncated, or not a safetensors file"
                )
            text = file.read(length)
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions"
        ) from error
    header = strict_json(text, f"{path}: header")
    if not isinstance(header, dict):
        raise SourceError(
            f"{path}: header is a JSON {type(header).__name__}, must be an object: not a safetensors file"
        )
    metadata = header.pop(_METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise SourceError(f"{path}: {_METADATA} must map strings to strings; save the file again")
    begin = 8 + length
    entries = [_entry(f"{path}: tensor {name!r}", name, fields, begin) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_layout(path, entries, begin, size)
    return SafetensorsHeader({entry.name: entry for entry in entries}, metadata)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(where: str, name: str, fields: object, begin: int) -> SafetensorsEntry:
    """One entry of the header, checked on its own. Raises SourceError that begins with `where`."""
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise SourceError(f"{where}: needs dtype, shape and data_offsets, got {fields!r:.200}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    dtype = _NAMES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise SourceError(f"{where}: dtype {code!r:.50} is not supported; Codeword knows {', '.join(_NAMES)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or len(shape) > _MAX_RANK:
        raise SourceError(f"{where}: shape must be a list of at most {_MAX_RANK} sizes, got {shape!r:.200}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise SourceError(f"{where}: data_offsets must be [start, end], got {offsets!r:.200}")
    itemsize = DTYPES[dtype].itemsize
    if itemsize * math.prod(size for size in shape if size) >= 2**63:
        # An axis of 0 makes any shape cost no bytes, yet NumPy cannot hold it.
        raise SourceError(f"{where}: shape {shape} is larger than any memory")
    needed, given = itemsize * math.prod(shape), offsets[1] - offsets[0]
    if needed != given:
        raise SourceError(f"{where}: {code} {shape} takes {needed} bytes, but data_offsets {offsets} span {given}")
    return SafetensorsEntry(name, dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _check_layout(path: Path, entries: Sequence[SafetensorsEntry], begin: int, size: int) -> None:
    """Entries in the order of their bytes must fill the file: no overlap, no hole, nothing missing or left over."""
    end = begin
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise SourceError(
                f"{path}: tensor {entry.name!r} {fault}: starts at byte {entry.start}, must start at {end}; "
                "save the file again"
            )
        end = entry.end
    if end != size:
        fault = f"is truncated (last tensor {entries[-1].name!r})" if end > size else "has bytes after its last tensor"
        raise SourceError(f"{path} {fault}: {size} bytes, its header says {end}; fetch or save it again")


def read_tensor(path: str | os.PathLike[str], entry: SafetensorsEntry) -> np.ndarray:
    """The tensor of one entry of `read_header(path)`: its shape and dtype, in memory of its own.

    Raises SourceError if the bytes cannot be read or are not values of the dtype.
    """
    count = entry.end - entry.start
    try:
        # Read, not mapped: mapped pages stay in the resident memory of the process long after they were used.
        data = np.fromfile(path, np.uint8, count=count, offset=entry.start)
    except OSError as error:
        raise SourceError(f"cannot read tensor {entry.name!r} of {path}: {error.strerror or error}") from error
    if len(data) != count:
        raise SourceError(
            f"{path}: tensor {entry.name!r} has {len(data)} of its {count} bytes; "
            "the file was cut after it was opened, fetch or save it again"
        )
    if entry.dtype == "bool" and count and int(data.max()) > 1:
        raise SourceError(f"{path}: tensor {entry.name!r} is BOOL but holds byte {int(data.max())}, must be 0 or 1")
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    load: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write (name, dtype, shape) tensors; `load(name)` is called once for each, when its bytes are due.

    The order in the file is the library's: wide dtypes first, which keeps every tensor aligned, then by name. The
    same arguments give the same bytes, whatever the order of `tensors`.

    Raises WriteError if the file cannot be written, a name is taken twice, a dtype is unknown, or an array is not
    what was announced; what was at `path` before is then untouched.
    """
    header: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    unknown = [f"{name!r} ({dtype})" for name, dtype, _ in tensors if dtype not in _CODES]
    if unknown:
        raise WriteError(f"cannot write {path}: safetensors has no dtype for {', '.join(unknown)}")
    ordered = sorted(tensors, key=lambda tensor: (-DTYPES[tensor[1]].itemsize, tensor[0]))
    end = 0
    for name, dtype, shape in ordered:
        if name in header or name == _METADATA:
            raise WriteError(f"cannot write {path}: the name {name!r} is taken; rename that tensor")
        start, end = end, end + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in ordered:
            array = load(name)
            if array.dtype != DTYPES[dtype] or array.shape != tuple(shape):
                raise WriteError(
                    f"cannot write {path}: tensor {name!r} was announced as {dtype} {tuple(shape)}, "
                    f"got {array.dtype} {array.shape}"
                )
            # Bytes by way of uint8: bfloat16 and float8 arrays do not offer themselves as buffers.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # or it would stay in memory while the next one loads
