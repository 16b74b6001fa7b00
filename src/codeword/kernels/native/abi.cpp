#include "core.hpp"

// Raised with `ABI` in build.py whenever a kernel is new or its arguments change: a library of another number is not used.
CW_EXPORT int64_t cw_abi() { return 6; }
