"""Where no compiler made the native core, tests run on NumPy by choice, without the warning of the fallback."""

import os

from codeword.kernels import native

if native.load() is None:
    os.environ.setdefault("CODEWORD_KERNELS", "numpy")
