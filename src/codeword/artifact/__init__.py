"""The .cw file: written as a pure function of its input, read lazily, checked on every read. Never imports torch."""

from codeword.artifact.coded import CodedTensor, code_tensor, tied_tensor
from codeword.artifact.layout import Entry
from codeword.artifact.reader import Artifact
from codeword.artifact.writer import Writer

__all__ = ["Artifact", "CodedTensor", "Entry", "Writer", "code_tensor", "tied_tensor"]
