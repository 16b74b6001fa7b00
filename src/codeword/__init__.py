"""Codeword: make trained networks small by weight sharing."""

__version__ = "0.1.0"
