"""A permutation that is computed, not stored: any element of any shuffle in constant time.

A balanced Feistel network permutes [0, 4^h) for the smallest h with 4^h ≥ n; a result outside
[0, n) is put in again until it falls inside (cycle walking; fewer than 4 rounds of it on average),
which leaves a permutation of [0, n). Memory does not depend on n.
"""

from typing import Any

import numpy as np

ROUNDS = 6  # lag-1 correlation and shard mixing are then those of a true permutation

Integers = np.ndarray[Any, np.dtype[Any]]


def mix(values: Integers) -> Integers:
    """Scramble uint64 values, bijectively (the finaliser of SplitMix64; Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(places: Integers, sizes: Integers | int, keys: Integers | int) -> Integers:
    """Return where each place of a shuffle of `sizes` elements points; all elementwise.

    `places` in [0, sizes) as int64, `keys` uint64: one shuffle for each key. Returns int64.
    """
    places = np.asarray(places, np.int64)
    n = np.broadcast_to(np.asarray(sizes, np.uint64), places.shape)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), places.shape)
    assert bool(((places >= 0) & (places < n.astype(np.int64))).all()), (
        "a place outside its shuffle"
    )
    half = _half_bits(n)
    result = places.astype(np.uint64)
    walking = np.arange(result.size)
    while walking.size:
        moved = _feistel(result[walking], half[walking], keys[walking])
        result[walking] = moved
        walking = walking[moved >= n[walking]]
    return result.astype(np.int64)


def _half_bits(n: Integers) -> Integers:
    """Return the smallest h with 4^h ≥ n."""
    bits = np.zeros(n.shape, np.uint64)
    for h in range(32):
        larger = n > np.uint64(4**h)
        if not larger.any():
            break
        bits += larger
    return bits


def _feistel(x: Integers, half: Integers, keys: Integers) -> Integers:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for number in range(ROUNDS):
        salt = np.uint64(0x9E3779B97F4A7C15 * (number + 1) % 2**64)
        left, right = right, left ^ (mix(right + keys + salt) & mask)
    return (left << half) | right
