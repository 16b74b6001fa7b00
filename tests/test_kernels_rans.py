"""The entropy coder: exact bytes, round trips, refusals, and its size against constriction's coders."""

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codeword.errors import FormatError
from codeword.kernels.rans import (
    MAX_ALPHABET,
    MAX_LANES,
    PRECISION,
    AdaptiveModel,
    adaptive_cost,
    block_ends,
    rans_decode,
    rans_encode,
)

LIMITS = [1 << 62, 1 << 16, 1 << 13]


def geometric(n, alphabet, seed=0, p=0.5):
    return np.minimum(np.random.default_rng(seed).geometric(p, n) - 1, alphabet - 1).astype(np.uint16)


def entropy_bits(symbols):
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(counts @ np.log2(len(symbols) / counts))


# -- exact bytes: a change here is a change of the format ----------------------------------------------------------


def test_golden_bytes():
    symbols = np.array([0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 3, 0] * 4, np.uint8)
    states, words = rans_encode(symbols, 4, 2, LIMITS[0])
    assert states.tobytes().hex() == "0c06c6e001107000"
    assert words.tobytes().hex() == "8009f766181d16d6"


def test_golden_frequencies():
    model = AdaptiveModel(3, LIMITS[0])
    assert model.frequencies().tolist() == [5462, 5461, 5461]  # the odd slot goes to the first of equals
    model.update(np.array([1, 1, 2]))
    assert model.counts.tolist() == [1, 5, 3]
    assert model.frequencies().tolist() == [1821, 9102, 5461]  # 1 + 16381 * (1, 5, 3) // 9, and one slot more


def test_counts_are_halved_above_the_limit_and_never_reach_zero():
    model = AdaptiveModel(2, 8)
    model.update(np.array([0, 0, 0, 0]))  # 9 + 1 > 8: (9 + 1) >> 1, (1 + 1) >> 1
    assert model.counts.tolist() == [5, 1]
    wide = AdaptiveModel(100, 8)  # the limit is below twice the alphabet, which then counts
    wide.update(np.zeros(60, np.int64))
    assert wide.counts.tolist() == [61] + [1] * 99


@pytest.mark.parametrize(
    ("n", "lanes", "expected"),
    [
        (0, 1, []),
        (40, 1, [(0, 32), (32, 40)]),
        (300, 4, [(0, 32), (32, 64), (64, 128), (128, 256), (256, 300)]),
        (1000, 256, [(0, 256), (256, 512), (512, 1000)]),
        (5000, 4096, [(0, 4096), (4096, 5000)]),
    ],
)
def test_block_schedule(n, lanes, expected):
    assert list(block_ends(n, lanes)) == expected


def test_blocks_stop_growing():
    sizes = [end - start for start, end in block_ends(100_000, 1)]
    assert max(sizes) == 1 << 14
    assert sum(sizes) == 100_000


# -- round trips --------------------------------------------------------------------------------------------------


def round_trip(symbols, alphabet, lanes, limit):
    states, words = rans_encode(symbols, alphabet, lanes, limit)
    assert states.dtype == np.uint32
    assert states.min() >= 1 << 16
    found = rans_decode(states, words, len(symbols), alphabet, limit, symbols.dtype)
    assert found.dtype == symbols.dtype
    np.testing.assert_array_equal(found, symbols)


@settings(deadline=None)
@given(
    st.integers(2, MAX_ALPHABET),
    st.integers(0, 12),
    st.sampled_from(LIMITS),
    st.integers(0, 3000),
    st.integers(0, 2**32 - 1),
    st.floats(0.001, 1),
)
def test_round_trip(alphabet, log_lanes, limit, n, seed, skew):
    generator = np.random.default_rng(seed)
    symbols = (alphabet * generator.random(n) ** (1 / skew)).astype(np.uint16)
    round_trip(symbols, alphabet, 1 << log_lanes, limit)


@given(st.lists(st.integers(0, 2), max_size=200), st.integers(0, 3))
def test_round_trip_of_chosen_symbols(symbols, log_lanes):
    round_trip(np.array(symbols, np.uint8), 3, 1 << log_lanes, LIMITS[0])


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("alphabet", [2, MAX_ALPHABET])
def test_round_trip_of_extremes(alphabet, limit):
    last = np.full(40_000, alphabet - 1, np.uint16)
    last[-1] = 0  # as rare as a symbol can be
    round_trip(last, alphabet, MAX_LANES, limit)
    round_trip(last, alphabet, 64, limit)


# -- size ---------------------------------------------------------------------------------------------------------


def constriction_nbytes(symbols, alphabet):
    """Bytes of constriction's ANS coder with the true histogram, which it is told for nothing."""
    probabilities = np.bincount(symbols, minlength=alphabet) / len(symbols)
    model = constriction.stream.model.Categorical(probabilities, perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), model)
    return 4 * len(coder.get_compressed())


def constriction_adaptive_nbytes(symbols, alphabet, limit):
    """Bytes of constriction's range coder with our own model, block by block."""
    coder, model = constriction.stream.queue.RangeEncoder(), AdaptiveModel(alphabet, limit)
    for start, end in block_ends(len(symbols), 1):
        probabilities = model.frequencies() / 2.0**PRECISION
        family = constriction.stream.model.Categorical(probabilities, perfect=False)
        coder.encode(symbols[start:end].astype(np.int32), family)
        model.update(symbols[start:end])
    return 4 * len(coder.get_compressed())


@pytest.mark.parametrize("alphabet", [2, 9, 200])
@pytest.mark.parametrize("p", [0.9, 0.3, 0.02])
def test_size_is_constrictions(alphabet, p):
    symbols = geometric(60_000, alphabet, p=p)
    states, words = rans_encode(symbols, alphabet, 1, LIMITS[0])
    ours = states.nbytes + words.nbytes
    assert ours <= 1.002 * constriction_adaptive_nbytes(symbols, alphabet, LIMITS[0]) + 8
    learning = alphabet * np.log2(len(symbols)) / 2 / 8  # what any coder pays that is not told the histogram
    reserve = -len(symbols) * np.log2(1 - alphabet / 2**PRECISION) / 8  # a slot for each symbol, seen or not
    assert ours <= 1.01 * constriction_nbytes(symbols, alphabet) + learning + reserve + 8
    assert ours >= entropy_bits(symbols) / 8 * 0.98


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("alphabet", "n"), [(2, 5000), (30, 50_000), (4096, 20_000)])
def test_adaptive_cost_foretells_the_size(alphabet, n, limit):
    symbols = geometric(n, alphabet, p=0.2)
    states, words = rans_encode(symbols, alphabet, 1, limit)
    assert abs(adaptive_cost(symbols, alphabet, 1, limit) / 8 - words.nbytes) <= 4 + 0.002 * words.nbytes
    assert len(states) == 1


def test_forgetting_pays_where_statistics_drift():
    drifting = np.concatenate([geometric(30_000, 64, seed) + 8 * seed for seed in range(6)])
    sizes = [len(rans_encode(drifting, 64, 16, limit)[1]) for limit in LIMITS]
    assert sizes[2] < sizes[1] < sizes[0]


# -- refusals -----------------------------------------------------------------------------------------------------


def test_streams_that_do_not_end_where_they_must_are_refused():
    symbols = geometric(500, 8)
    states, words = rans_encode(symbols, 8, 4, LIMITS[0])

    def refused(states, words, n=500, alphabet=8):
        with pytest.raises(FormatError, match="rans"):
            rans_decode(states, words, n, alphabet, LIMITS[0], np.dtype(np.uint16))

    refused(states, words[:-1])
    refused(states, np.append(words, np.uint16(0)))
    refused(states, words, n=499)
    refused(states, words, n=501)
    refused(states, words, alphabet=9)
    refused(states + np.uint32(1), words)


def test_a_lane_without_symbols_must_stay_at_its_start():
    states, words = rans_encode(np.array([1], np.uint8), 2, 4, LIMITS[0])
    assert states[1:].tolist() == [1 << 16] * 3
    states[3] += 1
    with pytest.raises(FormatError):
        rans_decode(states, words, 1, 2, LIMITS[0], np.dtype(np.uint8))
