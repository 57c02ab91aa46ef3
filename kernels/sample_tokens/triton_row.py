"""What a program of sample_tokens does with its row in Triton: hash and noise, settings, and truncation.

Truncation needs no sort: the last value that is kept is found bit by bit, with a count or a mass over the row in each
of 32 steps (the row stays in the cache), and an id settles its equals.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Legend
#   columns  columns that are vocabulary       start  global id of the first of them
#   z        logits, fp32                      key    order key (int64) or hash key (uint64)
#   (last_key, last_id)  a column survives truncation if its key is above last_key, or equal with an id <= last_id
#   allowed  a row's words of 32 bits, one bit for each global id
# Settings are numbers, or pointers to one for each row (BY_ROW).

# top_p and min_p are passed in units of 2^-53: Triton passes a float argument as fp32, and the rounding would show at a
# tie.
UNITS = tl.constexpr(1 << 53)


@triton.jit
def _splitmix64(x):
    """Return splitmix64 of a uint64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_key(seed, sequence_id, position):
    """Return one uint64 per row; its halves key the candidates."""
    key = _splitmix64(seed.to(tl.int64).to(tl.uint64)) ^ sequence_id.to(tl.int64).to(tl.uint64)
    return _splitmix64(_splitmix64(key) ^ position.to(tl.int64).to(tl.uint64))


@triton.jit
def candidate_hash(key, ids):
    """Return the hash of each candidate, uint32 below 2^31."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    x = ids.to(tl.uint32) * 0x9E3779B1 + low
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D + high
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return x & 0x7FFFFFFF


@triton.jit
def gumbel(bits):
    """Return Gumbel noise from 31 random bits."""
    # 1. A uniform in (0, 1): the constants are 2^-31 and the largest fp32 below 1.
    v = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.99999994039535522)
    # 2. -log1p(-v), an Exp(1) draw: log(w) is that of the rounded w = 1 - v, and v / (1 - w) corrects it.
    w = 1.0 - v
    rounded_v = 1.0 - w
    exponential = tl.where(rounded_v == 0.0, v, -tl.log(w) * (v / tl.where(rounded_v == 0.0, 1.0, rounded_v)))
    return -tl.log(exponential)


@triton.jit
def load_z(row_ptr, column, columns, start, allowed_ptr, ALLOWED: tl.constexpr):
    """Return logits, -inf beyond the vocabulary and where an id is not allowed."""
    z = tl.load(row_ptr + column, mask=column < columns, other=-float("inf")).to(tl.float32)
    if ALLOWED:
        word = tl.load(allowed_ptr + (start + column) // 32, mask=column < columns, other=0)
        z = tl.where((word >> ((start + column) % 32)) & 1 != 0, z, -float("inf"))
    return z


@triton.jit
def load_setting(x, n, BY_ROW: tl.constexpr):
    """Return a setting of row n."""
    if BY_ROW:
        return tl.load(x + n)
    else:
        return x


@triton.jit
def share_of(x, BY_ROW: tl.constexpr):
    """Return a share in fp64: fp32 by row, or a number of units."""
    # Widened first: Triton passes units below 2^31 as int32, which 2^53 does not fit.
    return x.to(tl.float64) if BY_ROW else x.to(tl.int64).to(tl.float64) / UNITS


@triton.jit
def over_temperature(shifted, temperature):
    """Return differences of logits over the temperature."""
    # div_rn is IEEE division, as PyTorch's: the default division rounds differently.
    return tl.div_rn(shifted, tl.full(shifted.shape, 0.0, tl.float32) + temperature)


@triton.jit
def mass_of(shifted, temperature):
    """Return exp(shifted / temperature) in fp64."""
    return tl.exp(over_temperature(shifted, temperature)).to(tl.float64)


@triton.jit
def order_key(z):
    """Return int64 keys in [0, 2^32) that order as z does."""
    # Adding 0.0 turns -0.0 into 0.0; negative floats order backwards by their bits, so all but the sign flips.
    bits = (z + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 2147483648


@triton.jit
def survives(key, column, last_key, last_id):
    """Return whether a column is at or before the last that truncation keeps."""
    return (key > last_key) | ((key == last_key) & (column <= last_id))


@triton.jit
def narrow_to_target(
    row_ptr,
    columns,
    start,
    allowed_ptr,
    temperature,
    row_max,
    last_key,
    last_id,
    target,
    WEIGHTED: tl.constexpr,
    ALLOWED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return (last_key, last_id) narrowed to the columns before which less than `target` lies.

    `target` is a number of columns, or if WEIGHTED a share of the mass of what survived so far.
    """
    lane = tl.arange(0, BLOCK)
    # 1. Turn the share into a mass.
    if WEIGHTED:
        mass = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, columns, BLOCK):
            z = load_z(row_ptr, begin + lane, columns, start, allowed_ptr, ALLOWED)
            alive = survives(order_key(z), begin + lane, last_key, last_id) & (begin + lane < columns)
            mass += tl.where(alive, mass_of(z - row_max, temperature), 0.0)
        target = target * tl.sum(mass, axis=0)
    # 2. The key of the last value that is kept, bit by bit from the highest of 32.
    new_key = last_key * 0
    step = new_key + 2147483648
    while step > 0:
        raised = new_key + step
        mass = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, columns, BLOCK):
            z = load_z(row_ptr, begin + lane, columns, start, allowed_ptr, ALLOWED)
            key = order_key(z)
            alive = survives(key, begin + lane, last_key, last_id) & (begin + lane < columns) & (key >= raised)
            if WEIGHTED:
                mass += tl.where(alive, mass_of(z - row_max, temperature), 0.0)
            else:
                mass += alive.to(tl.float64)
        new_key = tl.where(tl.sum(mass, axis=0) >= target, raised, new_key)
        step = step // 2
    # 3. What lies above that value.
    above = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, columns, BLOCK):
        z = load_z(row_ptr, begin + lane, columns, start, allowed_ptr, ALLOWED)
        key = order_key(z)
        alive = survives(key, begin + lane, last_key, last_id) & (begin + lane < columns) & (key > new_key)
        if WEIGHTED:
            above += tl.where(alive, mass_of(z - row_max, temperature), 0.0)
        else:
            above += alive.to(tl.float64)
    before = tl.sum(above, axis=0)
    # 4. Its equals, in the order of their ids, as long as they fit.
    new_id = new_key * 0 - 1
    equals_before = new_key * 0
    for begin in range(0, columns, BLOCK):
        z = load_z(row_ptr, begin + lane, columns, start, allowed_ptr, ALLOWED)
        key = order_key(z)
        equal = survives(key, begin + lane, last_key, last_id) & (begin + lane < columns) & (key == new_key)
        rank = equals_before + tl.cumsum(equal.to(tl.int64), axis=0) - 1
        one = mass_of(z - row_max, temperature) if WEIGHTED else tl.full((BLOCK,), 1.0, tl.float64)
        fits = equal & (before + rank.to(tl.float64) * one < target)
        new_id = tl.maximum(new_id, tl.max(tl.where(fits, begin + lane, -1), axis=0).to(tl.int64))
        equals_before += tl.sum(equal.to(tl.int64), axis=0)
    return new_key, new_id
