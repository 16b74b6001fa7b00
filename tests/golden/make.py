"""Wrote the golden files, once. They are never rewritten: a file written then decodes for ever.

    python tests/golden/make.py NAME...

writes NAME.cw and NAME.npz for names that have no file yet: for additions to the format.
"""

import sys
from pathlib import Path

import numpy as np

from codeword.artifact import Writer, code_tensor, tied_tensor
from codeword.expr import DTYPES, Affine, Lookup, Permute, Raw, Reshape, Scatter, Sum

HERE = Path(__file__).parent


def nodes():
    """Each node, alone and nested; a tied tensor in another shape; metadata."""
    codes = np.array([0, 1, 2, 1, 0, 2, 1, 1, 0, 2, 0, 0], np.uint8)
    book = np.array([-1.5, 0.25, 3, 1e-40, 0.5, -0.0], np.float32)
    positions = np.array([1, 4, 5, 11], np.uint16)
    kept = Raw(np.array([0.1, 1e30, -0.0, 7], np.float32))
    shared = Lookup(codes.reshape(2, 2, 3), book.reshape(2, 3, 1))
    scale = np.array([0.3, 1, -2, 1e-3], np.float16).reshape(4, 1, 1)
    tensors = {
        "raw": ("float32", (2, 3), Raw(np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3))),
        "lookup": ("float32", (4, 3), Reshape(shared, (4, 3))),
        "blocks": ("float32", (2, 12), Reshape(Lookup(codes.reshape(1, 2, 6), book.reshape(1, 3, 2)), (2, 12))),
        "affine": ("float32", (4, 3), Affine(shared, scale, np.float32([[[0.1]]]))),
        "offset": ("bfloat16", (4, 3), Affine(shared, None, np.arange(3, dtype=np.int8).reshape(3, 1))),
        "sum": ("float32", (12,), Sum((Reshape(shared, (12,)), Scatter(12, positions, kept)))),
        "scatter": ("float32", (3, 4), Scatter(12, positions, kept)),
        "permute": ("float32", (3, 4), Permute(Raw(np.arange(12, dtype=np.float16).reshape(4, 3)), (1, 0))),
        "scalar": ("int64", (), Raw(np.array(-(2**40)))),
        "empty": ("float32", (0, 3), Raw(np.zeros((0, 3), np.float32))),
    }
    return tensors, {"lookup again": ("lookup", (12,))}, {"made": "for ever"}


def borrowed():
    """Version 2: tensors that borrow one leaf, several, from several, and all they have; one tied to such."""
    generator = np.random.default_rng(1)
    codes = generator.integers(0, 12, (1, 4, 6)).astype(np.uint8)
    book = generator.integers(-99, 99, (1, 12, 2)).astype(np.int8)
    step = np.linspace(0.5, 2, 4, dtype=np.float32).reshape(4, 1, 1)
    positions = np.flatnonzero(generator.random(48) < 0.5).astype(np.uint16)
    kept = generator.normal(size=len(positions)).astype(np.float16)
    first = Affine(Lookup(codes, book), step)
    second = Affine(Lookup(11 - codes, book), step)
    sparse = Scatter(48, positions, Raw(kept))
    tensors = {
        "lender": ("float32", (4, 12), first),
        "codebook": ("float32", (4, 12), second),
        "all": ("float32", (12, 4), first),
        "two lenders": ("float32", (48,), Sum((Reshape(second, (48,)), sparse))),
        "third": ("float16", (6, 8), sparse),
    }
    return tensors, {"tied to one that borrows": ("all", (4, 12))}, {}


def dtypes():
    """Bit patterns of every dtype, NaN payloads and signed zeros included."""
    tensors = {}
    for name, dtype in DTYPES.items():
        patterns = np.random.default_rng(len(tensors)).bytes(24 * dtype.itemsize)
        values = np.frombuffer(patterns, np.uint8) & 1 if name == "bool" else np.frombuffer(patterns, np.uint8)
        tensors[name] = (name, (24,), Raw(values.view(dtype)))
    return tensors, {}, {}


def codecs():
    """Each codec, in each place it may stand."""
    generator = np.random.default_rng(0)
    skewed = np.minimum(generator.geometric(0.5, 6000) - 1, 12)
    drift = np.maximum(np.rint(generator.normal(np.linspace(3, 9, 12_000))), 0)
    arrays = {
        "raw": generator.integers(0, 256, 40).astype(np.uint8),
        "packed": generator.integers(-4, 4, 100).astype(np.int16),
        "constant": np.full(1000, -2.5, np.float16),
        "rans": skewed.astype(np.uint8),
        "rans short": skewed[:150].astype(np.int32),
        "rans forgets": drift.astype(np.uint16),
        "planes": generator.normal(size=1500).astype(np.float32),
        "planes of float64": np.float64(generator.integers(1, 50, 300)) / 16,
        "rising": np.flatnonzero(generator.random(4000) < 0.1).astype(np.uint32),
        "rising evenly": np.arange(1 << 40, (1 << 40) + 700, 7, dtype=np.uint64),
        "rising floats": np.sort(generator.random(300)).astype(np.float32),
    }
    return {name: (str(values.dtype), values.shape, Raw(values)) for name, values in arrays.items()}, {}, {}


def pooled():
    """Version 3: pools of one stream and apart, spaced, of several dtypes; pooled leaves that are borrowed; tied."""
    generator = np.random.default_rng(2)
    codes = generator.integers(0, 16, (1, 4, 40)).astype(np.uint8)
    tensors = {}
    for at in range(6):
        book = np.sort(generator.choice(200, 16, replace=False) - 100).astype(np.int8).reshape(1, 16, 1)
        rounded = generator.normal(size=32).astype(np.float32).view(np.uint32) & np.uint32(0xFFF00000)
        step = generator.choice([0.75, 1, 1.25, 1.5, 1.75], (4, 1, 1)).astype(np.float16)
        tensors |= {
            f"{at}.weight": ("float32", (4, 40), Affine(Lookup((codes + at) % 16, book), step)),
            f"{at}.bias": ("float32", (32,), Raw(rounded.view(np.float32))),
            f"{at}.running_mean": ("float32", (32,), Raw(np.zeros(32, np.float32))),
            f"{at}.count": ("int64", (), Raw(np.array(1000 + at % 3))),
            f"{at}.even": ("uint16", (9,), Raw(np.uint16(5 + 64 * generator.integers(0, 9, 9)))),
        }
    tensors |= {
        "all borrowed": ("float16", (4, 40), tensors["0.weight"][2]),
        "one.scale": ("float32", (4,), Raw(np.float32([0.1, 0.2, 0.3, 0.4]))),
        "far.scale": ("float32", (400,), Raw(np.full(400, 1e30, np.float32))),
    }
    return tensors, {"tied to a pooled one": ("0.bias", (4, 8))}, {"pools": "yes"}


def write(name):
    """Write NAME.cw and NAME.npz, unless one is there."""
    tensors, tied, metadata = globals()[name]()
    writer = Writer()
    index = {tensor: writer.add(code_tensor(tensor, *spec)) for tensor, spec in tensors.items()}
    for tensor, (target, dims) in tied.items():
        writer.add(tied_tensor(tensor, tensors[target][0], dims, index[target]))
    artifact = writer.finish(metadata)
    for suffix in (".cw", ".npz"):
        if (HERE / name).with_suffix(suffix).exists():
            raise FileExistsError(f"{name}{suffix} is golden: it stays as it is")
    artifact.save((HERE / name).with_suffix(".cw"))
    # As bytes: npz knows neither bfloat16 nor float8.
    arrays = {tensor: np.frombuffer(artifact.decode(tensor).tobytes(), np.uint8) for tensor in artifact}
    np.savez_compressed((HERE / name).with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    for each in sys.argv[1:]:
        write(each)
