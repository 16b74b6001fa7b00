"""A second reader of .cw files, written from docs/design/format.md alone: the oracle for the one that ships.

Plain Python on purpose: no NumPy, nothing of codeword, no attention to speed. `read` gives every tensor of a file as
(dtype, shape, little-endian bytes); whatever the text tells a reader to refuse raises `RefusedError`.
"""

import json
import math
import zlib
from fractions import Fraction
from itertools import accumulate, pairwise, product

MAGIC = bytes([0x89, 0x43, 0x57, 0x0D, 0x0A, 0x1A, 0x0A, 0x00])
# name, bytes, (precision with the hidden bit, least exponent of a normal, largest finite pattern) of floats
TYPES = [
    ("float32", 4, (24, -126, 0x7F7FFFFF)),
    ("float16", 2, (11, -14, 0x7BFF)),
    ("bfloat16", 2, (8, -126, 0x7F7F)),
    ("float64", 8, (53, -1022, 0x7FEFFFFFFFFFFFFF)),
    *((f"uint{bits}", bits // 8, None) for bits in (8, 16, 32, 64)),
    *((f"int{bits}", bits // 8, None) for bits in (8, 16, 32, 64)),
    ("bool", 1, None),
    ("float8_e4m3", 1, (4, -6, 0x7E)),
    ("float8_e5m2", 1, (3, -14, 0x7B)),
]
FLOAT32 = 0
EXACT_IN_FLOAT32 = {"float32", "float16", "bfloat16", "uint8", "uint16", "int8", "int16", "bool", "float8_e4m3",
                    "float8_e5m2"}  # fmt: skip
SLOTS = 1 << 14


class RefusedError(Exception):
    pass


def need(condition, why):
    if not condition:
        raise RefusedError(why)


class Bytes:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        need(count <= len(self.data) - self.at, "too short")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self):
        return self.take(1)[0]

    def number(self, count):
        return int.from_bytes(self.take(count), "little")

    def varint(self):
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            need(value < 1 << 64, "varint too large")
            if byte < 128:
                need(byte or shift == 7, "varint not in its shortest form")
                return value

    def rest(self):
        return self.take(len(self.data) - self.at)


# -- frame and header ---------------------------------------------------------------------------------------------


def read(data):
    """{name: (dtype, shape, bytes)} and the metadata of a whole file."""
    file = Bytes(data)
    need(file.take(8) == MAGIC, "magic")
    fixed = file.take(5)
    need(fixed[0] in (1, 2, 3), "version")
    length, crc = int.from_bytes(fixed[1:], "little"), file.number(4)
    need(length <= 1 << 22, "header length")
    deflated = file.take(length)
    need(zlib.crc32(fixed + deflated) == crc, "header CRC")
    inflate = zlib.decompressobj(-15)
    try:
        plain = inflate.decompress(deflated, 1 << 22)
    except zlib.error:
        raise RefusedError("deflate") from None
    need(inflate.eof and not inflate.unused_data, "deflate stream does not end with the header")
    entries, pools, metadata = header(Bytes(plain), fixed[0])
    payloads = []
    for *_, infos in entries:
        streams = file.take(sum(size for *_, size in infos if isinstance(size, int)))
        if any(info[1] != 6 for info in infos):
            need(zlib.crc32(streams) == file.number(4), "tensor CRC")
        payloads.append(Bytes(streams))
    filled = pooled(file, pools)
    found, stored = {}, []
    for (name, dtype, dims, tree, infos), streams in zip(entries, payloads, strict=True):
        stored.append([])
        if isinstance(tree, int):
            found[name] = (TYPES[dtype][0], dims, found[entries[tree][0]][2])
            continue
        for *info, size in infos:
            if info[1] == 5:
                stored[-1].append(stored[size[0]][size[1]])
            elif info[1] == 6:
                patterns = [next(filled[size[0]]) for _ in range(math.prod(info[2]))]
                stored[-1].append((info[0], info[2], patterns))
            else:
                stored[-1].append(leaf(Bytes(streams.take(size)), *info))
        arrays = stored[-1]
        found_dtype, _, patterns = decode(tree, iter(arrays))
        if found_dtype != dtype:
            patterns = [pattern(value_of(p, found_dtype), dtype) for p in patterns]
        width = TYPES[dtype][1]
        found[name] = (TYPES[dtype][0], dims, b"".join(p.to_bytes(width, "little") for p in patterns))
    need(file.at == len(data), "too long")
    return found, metadata


def pooled(file, pools):
    """The values of each pool, one after another."""
    if not pools:
        return []
    streams = file.take(sum(size for *_, size in pools))
    need(zlib.crc32(streams) == file.number(4), "CRC of pools")
    streams, found = Bytes(streams), []
    for dtype, sizes, codec, size in pools:
        stream = Bytes(streams.take(size))
        if codec != 7:
            found.append(iter(leaf(stream, dtype, codec, (sum(sizes),), in_pool=True)[2]))
            continue
        patterns = []
        for count in sizes:
            inner = stream.byte()
            patterns += leaf(Bytes(stream.take(stream.varint())), dtype, inner, (count,))[2]
        need(stream.at == len(stream.data), "length of a pool")
        found.append(iter(patterns))
    return found


def header(plain, version):
    count = plain.varint()
    need(count <= len(plain.data), "count")
    names = []
    for _ in range(count):
        end = plain.data.find(b"\0", plain.at)
        need(1 <= end - plain.at <= 1024, "name")
        try:
            names.append(plain.take(end - plain.at).decode("utf-8"))
        except UnicodeDecodeError:
            raise RefusedError("name is not UTF-8") from None
        plain.byte()
    need(len(set(names)) == count, "duplicate name")
    entries, pools = [], []
    for name in names:
        tag = plain.byte()
        dtype, dims = known(tag & 15), read_dims(plain, tag >> 4)
        if plain.data[plain.at : plain.at + 1] == b"\7":
            plain.byte()
            target = plain.varint()
            need(target < len(entries) and not isinstance(entries[target][3], int), "tied to")
            need(entries[target][1] == dtype and math.prod(entries[target][2]) == math.prod(dims), "tied shape")
            entries.append((name, dtype, dims, target, ()))
            continue
        infos = []
        tree, shape, result = read_node(
            plain, infos, 0, entries if version >= 2 else None, pools if version >= 3 else None
        )
        need(math.prod(shape) == math.prod(dims), "size")
        cast = TYPES[dtype][2] is not None and TYPES[result][0] in EXACT_IN_FLOAT32
        need(result == dtype or cast, "dtype of the expression")
        entries.append((name, dtype, dims, tree, infos))
    if version >= 3:
        need(plain.varint() == len(pools), "number of pools")
        for pool in pools:
            pool += [plain.byte(), plain.varint()]
            need(pool[2] in (0, 1, 2, 3, 4, 7, 8), "codec of a pool")
    text = plain.rest()
    need(len(text) <= 65536, "metadata size")
    try:
        metadata = json.loads(text.decode("utf-8")) if text else {}
    except (ValueError, RecursionError):
        raise RefusedError("metadata") from None
    need(isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()), "metadata values")
    return entries, pools, metadata


def known(dtype):
    need(dtype < len(TYPES), "dtype")
    return dtype


def capped(dims):
    need(math.prod(max(dim, 1) for dim in dims) <= 1 << 40, "elements")
    return dims


def read_dims(plain, rank):
    need(rank <= 15, "rank")
    return capped(tuple(plain.varint() for _ in range(rank)))


def unsigned(info):
    need(TYPES[info[0]][0].startswith("uint"), "unsigned")


def read_node(plain, infos, depth, lenders, pools):
    """(tree, shape, dtype); a tree is (tag, what decode needs besides the leaves, inner trees)."""
    need(depth <= 8, "depth")

    def read_leaf():
        tag = plain.byte()
        need(tag >> 4 <= (4 if lenders is None else 5 if pools is None else 6), "codec")
        dtype, dims = known(tag & 15), read_dims(plain, plain.varint())
        if tag >> 4 == 5:
            i, j = plain.varint(), plain.varint()
            need(i < len(lenders) and not isinstance(lenders[i][3], int) and j < len(lenders[i][4]), "lender")
            lent = lenders[i][4][j]
            need(lent[1] != 5 and (lent[0], lent[2]) == (dtype, dims), "borrowed leaf")
            infos.append((dtype, 5, dims, (i, j)))
        elif tag >> 4 == 6:
            q, count = plain.varint(), math.prod(dims)
            need(q <= len(pools) and q < 256, "pool")
            if q == len(pools):
                pools.append([dtype, []])
            need(pools[q][0] == dtype and count <= 1 << 12, "pooled leaf")
            pools[q][1].append(count)
            need(sum(pools[q][1]) <= 1 << 20, "size of a pool")
            infos.append((dtype, 6, dims, (q,)))
        else:
            infos.append((dtype, tag >> 4, dims, plain.varint()))
        need(len(infos) <= 256, "leaves")
        return infos[-1]

    def inner():
        return read_node(plain, infos, depth + 1, lenders, pools)

    tag = plain.byte()
    if tag == 0:
        values = read_leaf()
        return (0, None, ()), values[2], values[0]
    if tag == 1:
        codes, codebook = read_leaf(), read_leaf()
        unsigned(codes)
        need(len(codes[2]) == len(codebook[2]) == 3 and codes[2][0] == codebook[2][0], "lookup shapes")
        (g, r, c), d = codes[2], codebook[2][2]
        return (1, None, ()), capped((g * r, c, d)), codebook[0]
    if tag == 2:
        flags = plain.byte()
        need(flags <= 3, "flags")
        tree, shape, _ = inner()
        for bit in (1, 2):
            if flags & bit:
                dims = read_leaf()[2]
                need(len(dims) <= len(shape), "broadcast rank")
                pairs = zip(reversed(dims), reversed(shape), strict=False)
                need(all(a in (1, b) for a, b in pairs), "broadcast")
        return (2, flags, (tree,)), shape, FLOAT32
    if tag == 3:
        count = plain.byte()
        need(1 <= count <= 16, "terms")
        terms = [inner() for _ in range(count)]
        need(all(term[1] == terms[0][1] for term in terms), "shapes of terms")
        return (3, None, tuple(term[0] for term in terms)), terms[0][1], FLOAT32
    if tag == 4:
        size = plain.varint()
        need(size <= 1 << 40, "size")
        positions = read_leaf()
        unsigned(positions)
        tree, shape, dtype = inner()
        need(len(positions[2]) == 1 and positions[2][0] == math.prod(shape) <= size, "positions")
        return (4, size, (tree,)), (size,), dtype
    if tag == 5:
        count = plain.varint()
        need(count <= 15, "rank")
        order = tuple(plain.varint() for _ in range(count))
        tree, shape, dtype = inner()
        need(sorted(order) == list(range(len(shape))), "order")
        return (5, order, (tree,)), tuple(shape[axis] for axis in order), dtype
    need(tag == 6, "node")
    dims = read_dims(plain, plain.varint())
    tree, shape, dtype = inner()
    need(math.prod(dims) == math.prod(shape), "reshape")
    return (6, dims, (tree,)), dims, dtype


# -- expressions: arrays are (dtype, shape, bit patterns in C order) ----------------------------------------------


def decode(tree, arrays):
    tag, extra, inner = tree
    if tag == 0:
        return next(arrays)
    if tag == 1:
        (_, (g, r, c), codes), (dtype, (_, k, d), words) = next(arrays), next(arrays)
        need(all(code < k for code in codes), "code")
        out = []
        for at, code in enumerate(codes):
            first = (at // (r * c) * k + code) * d
            out += words[first : first + d]
        return dtype, (g * r, c, d), out
    if tag == 2:
        dtype, shape, patterns = decode(inner[0], arrays)
        values = [to_float32(value_of(p, dtype)) for p in patterns]
        for bit in (1, 2):
            if extra & bit:
                other = spread(next(arrays), shape)
                pairs = zip(values, other, strict=True)
                values = [to_float32(a * b if bit == 1 else a + b) for a, b in pairs]
        return FLOAT32, shape, [pattern(value, FLOAT32) for value in values]
    if tag == 3:
        total = None
        for term in inner:
            dtype, shape, patterns = decode(term, arrays)
            values = [to_float32(value_of(p, dtype)) for p in patterns]
            total = values if total is None else [to_float32(a + b) for a, b in zip(total, values, strict=True)]
        return FLOAT32, shape, [pattern(value, FLOAT32) for value in total]
    if tag == 4:
        _, _, positions = next(arrays)
        need(all(a < b for a, b in pairwise(positions)), "positions rise")
        need(not positions or positions[-1] < extra, "position")
        dtype, _, patterns = decode(inner[0], arrays)
        dense = [0] * extra
        for position, p in zip(positions, patterns, strict=True):
            dense[position] = p
        return dtype, (extra,), dense
    dtype, shape, patterns = decode(inner[0], arrays)
    if tag == 6:
        return dtype, extra, patterns
    steps = strides(shape)
    new = tuple(shape[axis] for axis in extra)
    where = product(*map(range, new))
    return dtype, new, [patterns[sum(i * steps[axis] for i, axis in zip(at, extra, strict=True))] for at in where]


def strides(shape):
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def spread(array, shape):
    """Float32 values of an array, broadcast to shape."""
    dtype, dims, patterns = array
    dims = (1,) * (len(shape) - len(dims)) + tuple(dims)
    steps = [0 if dim == 1 else step for dim, step in zip(dims, strides(dims), strict=True)]
    where = product(*map(range, shape))
    picked = (patterns[sum(i * step for i, step in zip(at, steps, strict=True))] for at in where)
    return [to_float32(value_of(p, dtype)) for p in picked]


def value_of(p, dtype):
    """The number of a bit pattern: a float, or an int of any size."""
    name, width, form = TYPES[dtype]
    if form is None:
        return p - (1 << 8 * width) if name.startswith("int") and p >> (8 * width - 1) else p
    precision, least, largest = form
    sign = -1.0 if p >> (8 * width - 1) else 1.0
    p &= (1 << (8 * width - 1)) - 1
    if p > largest:
        return sign * math.inf if p == largest + 1 and name != "float8_e4m3" else math.nan
    exponent, mantissa = p >> (precision - 1), p & ((1 << (precision - 1)) - 1)
    if exponent:
        mantissa += 1 << (precision - 1)
    return sign * math.ldexp(mantissa, max(exponent - 1, 0) + least - precision + 1)


def pattern(value, dtype):
    """The bit pattern of a floating dtype nearest to a number, ties to even."""
    name, width, (precision, least, largest) = TYPES[dtype]
    sign = int(value < 0 or (isinstance(value, float) and math.copysign(1, value) < 0)) << (8 * width - 1)
    beyond = largest + 1  # infinity, or E4M3FN's NaN
    if value != value:
        return beyond if name == "float8_e4m3" else beyond | 1 << (precision - 2)
    if value in (math.inf, -math.inf):
        return sign | beyond
    exact = abs(Fraction(value))
    if not exact:
        return sign
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    exponent -= exact < Fraction(2) ** exponent
    exponent = max(exponent, least)
    mantissa = round(exact / Fraction(2) ** (exponent - precision + 1))  # Fraction rounds ties to even
    return sign | min(((exponent - least) << (precision - 1)) + mantissa, beyond)


def to_float32(value):
    """Products and sums of two float32 are doubles before this: exact, or rounded far enough below to be harmless."""
    return value_of(pattern(value, FLOAT32), FLOAT32)


# -- leaves -------------------------------------------------------------------------------------------------------


def leaf(stream, dtype, codec, dims, in_pool=False):
    name, width, form = TYPES[dtype]
    n, bits = math.prod(dims), 8 * width
    if codec == 0:
        patterns = [stream.number(width) for _ in range(n)]
        need(stream.at == len(stream.data), "raw length")
    else:
        patterns = keys(stream, codec, bits, n, (1, 2, 3, 4, *[8] * in_pool))
        if form is not None:
            patterns = [key >> 1 | (key & 1) << (bits - 1) for key in patterns]
        elif name.startswith("int"):
            patterns = [key ^ 1 << (bits - 1) for key in patterns]
    need(name != "bool" or all(p < 2 for p in patterns), "bool")
    return dtype, dims, patterns


def keys(stream, codec, bits, n, allowed):
    need(codec in allowed, "codec here")
    if codec == 0:
        found = [stream.number(bits // 8) for _ in range(n)]
    elif codec == 1:
        base, width = stream.varint(), stream.byte()
        need(width <= bits and base < 1 << bits, "width")
        whole = stream.number((n * width + 7) // 8)
        found = [base + (whole >> i * width & (1 << width) - 1) for i in range(n)]
    elif codec == 2:
        found = rans(stream, bits, n)
    elif codec == 3:
        need(bits > 8, "planes of bytes")
        found = [0] * n
        for _ in range(bits // 8):
            inner = stream.byte()
            plane = keys(Bytes(stream.take(stream.varint())), inner, 8, n, (0, 1, 2, *[8] * (8 in allowed)))
            found = [key << 8 | byte for key, byte in zip(found, plane, strict=True)]
    elif codec == 8:
        base, shift, inner = stream.varint(), stream.byte(), stream.byte()
        need(0 < shift < bits and base < 1 << bits, "shift")
        found = [base + (step << shift) for step in keys(stream, inner, bits, n, (1, 2))]
    else:
        need(n >= 1, "rising and empty")
        first, inner = stream.varint(), stream.byte()
        gaps = keys(stream, inner, bits, n - 1, (0, 1, 2, 3))
        found = list(accumulate((gap + 1 for gap in gaps), initial=first))
    need(stream.at == len(stream.data), "stream not used up")
    need(all(key < 1 << bits for key in found), "key")
    return found


def rans(stream, bits, n):
    base, size, flags = stream.varint(), stream.varint() + 1, stream.byte()
    need(2 <= size <= 4096 and base + size - 1 < 1 << bits, "alphabet")
    need(flags & 15 <= 12 and flags >> 4 <= 2, "lanes and limit")
    lanes, limit = 1 << (flags & 15), (1 << 62, 1 << 16, 1 << 13)[flags >> 4]
    states = [stream.number(4) for _ in range(lanes)]
    need(all(x >= 1 << 16 for x in states), "state")
    counts, out, block = [1] * size, [], max(32, lanes)
    while len(out) < n:
        total = sum(counts)
        freq = [1 + count * (SLOTS - size) // total for count in counts]
        freq[counts.index(max(counts))] += SLOTS - sum(freq)
        begin = [0, *accumulate(freq)]
        symbol_of = [a for a in range(size) for _ in range(freq[a])]
        seen = len(out)
        for i in range(min(block, n - seen)):
            x = states[i % lanes]
            slot = x & (SLOTS - 1)
            a = symbol_of[slot]
            x = freq[a] * (x >> 14) + slot - begin[a]
            if x < 1 << 16:
                x = x << 16 | stream.number(2)
            states[i % lanes] = x
            out.append(a)
        for a in out[seen:]:
            counts[a] += 2
        while sum(counts) > max(limit, 2 * size):
            counts = [(count + 1) // 2 for count in counts]
        block = min(max(block, len(out)), SLOTS)
    need(all(x == 1 << 16 for x in states), "final states")
    return [base + a for a in out]
