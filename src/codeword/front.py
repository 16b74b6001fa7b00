"""Bytes against accuracy: files of ours at many targets, peers on the same images, and who is ahead by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

OURS = "codeword"
ROUNDING, XZ = "uniform", "xz"  # the peer and the packing that anyone can make

# What files are compared by: how often they are right, or how often they say what the uncompressed net says. Where few
# images change sides top-1 is mostly luck, for as many may turn right as wrong.
Measure: TypeAlias = Literal["top1", "agreement"]

_NEAR = 2.0  # times our bytes: what is larger by more is no rival


class Row(msgspec.Struct, frozen=True):
    """One file: who made it, how, its bytes, and what the net scores from it."""

    method: str  # OURS or the name of a peer
    settings: str
    packing: str  # "cw" of ours
    nbytes: int
    top1: float  # percent
    agreement: float  # percent of images whose top-1 class is that of the uncompressed net
    seconds: float  # to make it, without coding of peers
    file: str | None = None  # where it lies beside the record; peers are measured, not kept


class Front(msgspec.Struct, frozen=True):
    """What a sweep measured. Everything was scored on the same n images; nothing was retrained."""

    net: str
    digest: str  # of the uncompressed weights
    data: str
    n: int
    calibration: str | None
    dense_nbytes: int
    dense_top1: float
    rows: list[Row] = []
    missing: dict[str, str] = {}  # peer -> why it is not among the rows

    def of(self, *methods: str) -> list[Row]:
        """The rows of these methods."""
        return [row for row in self.rows if row.method in methods]

    @property
    def ours(self) -> list[Row]:
        """Our files, the smallest first."""
        return sorted(self.of(OURS), key=lambda row: row.nbytes)

    @property
    def peers(self) -> list[str]:
        """Names of the peers that have rows, in the order they came."""
        return list(dict.fromkeys(row.method for row in self.rows if row.method != OURS))

    def ratio(self, row: Row) -> float:
        """How many times smaller than in float32."""
        return self.dense_nbytes / row.nbytes


class Beside(msgspec.Struct, frozen=True):
    """One peer's row beside one of ours."""

    row: Row
    ahead: float  # points of ours above it, in what they are compared by


class Margin(msgspec.Struct, frozen=True):
    """One of our files beside all peers."""

    row: Row
    within: Beside | None  # the best peer that takes no more bytes
    # Of each peer the next larger file that none of its smaller ones beats, if it is at most twice as large.
    larger: dict[str, Beside]
    # Share of bytes less than rounding + xz takes to be as good, 0..1; None for a file that a smaller one beats.
    saved: float | None


def unbeaten(rows: Iterable[Row], by: Measure = "top1") -> list[Row]:
    """Rows by bytes, each better than all that are no larger."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.nbytes, -worth(row, by))):
        if not found or worth(row, by) > worth(found[-1], by):
            found.append(row)
    return found


def margins(front: Front, by: Measure = "top1") -> list[Margin]:
    """Each of our files beside the peers, the largest first."""
    everyone = [row for row in front.rows if row.method != OURS]
    mine = unbeaten(front.ours, by)
    rounding = unbeaten((row for row in front.of(ROUNDING) if row.packing == XZ), by)
    found = []
    for row in reversed(front.ours):
        own = worth(row, by)
        within = (peer for peer in everyone if peer.nbytes <= row.nbytes)
        best = max(within, key=lambda peer: (worth(peer, by), -peer.nbytes), default=None)
        larger = {}
        for name in front.peers:
            after = next((peer for peer in unbeaten(front.of(name), by) if peer.nbytes >= row.nbytes), None)
            if after is not None and after.nbytes <= _NEAR * row.nbytes:
                larger[name] = Beside(after, own - worth(after, by))
        needed = bytes_for(rounding, own, by) if row in mine else None
        saved = None if needed is None else 1 - row.nbytes / needed
        found.append(Margin(row, None if best is None else Beside(best, own - worth(best, by)), larger, saved))
    return found


def worth(row: Row, by: Measure) -> float:
    """What a file is compared by, percent."""
    return row.top1 if by == "top1" else row.agreement


def bytes_for(rows: Sequence[Row], wanted: float, by: Measure = "top1") -> float | None:
    """Bytes at which unbeaten rows are as good as that, on lines between them over log bytes; None if none is."""
    for below, above in zip([None, *rows], rows, strict=False):
        if worth(above, by) < wanted:
            continue
        if below is None:
            return float(above.nbytes)
        share = (wanted - worth(below, by)) / (worth(above, by) - worth(below, by))
        return math.exp(math.log(below.nbytes) + share * math.log(above.nbytes / below.nbytes))
    return None
