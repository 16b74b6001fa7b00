"""`python -m codeword.kernels.native` compiles the core: its sources changed, or there is a compiler now."""

import sys

from codeword.kernels.native.build import build

sys.exit(build())
