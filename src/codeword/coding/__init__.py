"""Leaves to bytes and back: `encode_leaf` keeps the shortest of all codecs that fit, `decode_leaf` undoes any."""

from codeword.coding.codecs import Codec, decode_leaf, encode_leaf

__all__ = ["Codec", "decode_leaf", "encode_leaf"]
