"""Where no compiler made the native core, tests run on NumPy by choice, without the warning of the fallback.

Nothing is kept from one run of the tests for the next, unless a test names a folder for it.
"""

import os
import signal

from codeword.kernels import native

if native.load() is None:
    os.environ.setdefault("CODEWORD_KERNELS", "numpy")
os.environ["CODEWORD_CACHE"] = ""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job: tests interrupt what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
