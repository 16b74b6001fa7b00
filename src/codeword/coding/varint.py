"""Unsigned integers in as few bytes as they need: seven bits a byte, low bits first, top bit for "more" (LEB128)."""

from __future__ import annotations

from codeword.errors import FormatError

_MAX_BYTES = 10  # 70 bits: enough for any 64-bit value


def put_varint(value: int) -> bytes:
    """Bytes of a value in [0, 2**64)."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Walks over bytes; every read checks what is left and names `where` when it runs short."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data = data
        self.at = 0
        self.where = where

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.left:
            raise FormatError(f"{self.where}: needs {count} bytes at byte {self.at}, has {self.left}")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """The next LEB128 value, in its shortest form and below 2**64."""
        value, start = 0, self.at
        for shift in range(0, 7 * _MAX_BYTES, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 1 << 64 or (byte == 0 and shift):
                    break
                return value
        raise FormatError(f"{self.where}: no valid number at byte {start}")

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def finish(self) -> None:
        """Raises FormatError if anything is left."""
        if self.left:
            raise FormatError(f"{self.where}: {self.left} bytes too many")
