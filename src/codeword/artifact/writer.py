"""Coded tensors, one after another, into an artifact. Payloads wait in a spool: memory holds one tensor at a time."""

from __future__ import annotations

import tempfile
from typing import IO

from codeword.artifact.coded import CodedTensor
from codeword.artifact.layout import encode_header
from codeword.artifact.reader import Artifact

_SPOOL_NBYTES = 1 << 24  # stays in memory up to this size, then moves to a temporary file


class _Spool(tempfile.SpooledTemporaryFile):
    """Nobody has to close it: an artifact that was never saved is no mistake to warn of."""

    def __del__(self) -> None:
        self.close()


class Writer:
    """Takes coded tensors in file order; `finish` gives the artifact that `save` writes to disk."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._trees: list[bytes] = []
        self._spool: IO[bytes] = _Spool(max_size=_SPOOL_NBYTES)  # the artifact's from `finish` on

    def add(self, tensor: CodedTensor) -> int:
        """Append a tensor; returns its index in the header."""
        self._names.append(tensor.name)
        self._trees.append(tensor.tree)
        self._spool.write(tensor.payload)
        return len(self._names) - 1

    def finish(self, metadata: dict[str, str] | None = None) -> Artifact:
        """The artifact of all tensors added. The writer is done after this."""
        header = encode_header(self._names, self._trees, metadata or {})
        payload_nbytes = self._spool.tell()
        return Artifact(header, self._spool, payload_at=0, payload_nbytes=payload_nbytes, where="artifact")
