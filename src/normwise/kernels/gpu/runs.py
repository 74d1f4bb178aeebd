"""Runs: channels before positions, so that a set is one contiguous run, and a channel a part of it.

Sets that fit registers are read whole (whole.py), and long ones in pieces (pieces.py). The kernels
here are of those between: a program reads its set twice, the second time from the L2.
"""

import triton
import triton.language as tl

from normwise.kernels.gpu.arithmetic import (
    inverse_root,
    normalize,
    not_negative,
    own,
    parameter,
    plus,
    read,
    read_sum,
    result,
    through,
    write,
    write_gradient,
)


@triton.jit
def _moments(x_of_set, RESIDUAL, SUM, size, SUBTRACT_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and variance of a set, which is read as one run."""
    index = tl.arange(0, BLOCK)
    shift = 0.0
    if SUBTRACT_MEAN:
        # Sums are shifted by the mean of the first tile: of no less, for an element far off would
        # leave few digits of the others; and that from one of them, so that equal ones leave 0.
        there = index < size
        x = read_sum(x_of_set, RESIDUAL, None, index, there)
        shift = plus(tl.load(x_of_set).to(tl.float32), RESIDUAL, None, 0, True)
        count = tl.minimum(size, BLOCK).to(tl.float32)
        shift += tl.sum(tl.where(there, x - shift, 0.0), 0) / count
    total, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        there = start + index < size
        x = read(x_of_set + start, index, there)
        x = plus(x, RESIDUAL, SUM, start + index, there)
        deviation = tl.where(there, x - shift, 0.0)
        total += deviation
        squares += deviation * deviation
    count = size.to(tl.float32)
    mean, square = 0.0, tl.sum(squares, 0)
    if SUBTRACT_MEAN:
        rest = tl.sum(total, 0) / count
        mean = shift + rest
        square = not_negative(square - rest * rest * count)
    return mean, square / count


@triton.jit
def _tile(start, members, positions, MEMBERS: tl.constexpr, BLOCK_POSITIONS: tl.constexpr):
    """Where the elements of a tile (members, positions) lie in a set, and which there are."""
    position = start + tl.arange(0, BLOCK_POSITIONS)
    place = members[:, None].to(tl.int64) * positions + position[None, :]
    return place, (members < MEMBERS)[:, None] & (position < positions)[None, :]


@triton.jit
def forward(
    X,
    GAMMA,
    BETA,
    RESIDUAL,
    Y,
    STATISTICS,
    SUM,
    positions,
    programs_of_sample,
    epsilon,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """y and the statistics (outer, 2, groups)."""
    row = tl.program_id(0).to(tl.int64)
    size = positions.to(tl.int64) * MEMBERS
    x_of_set, y_of_set = X + row * size, Y + row * size
    if RESIDUAL is not None:
        RESIDUAL += row * size
        SUM += row * size
    mean, variance = _moments(x_of_set, RESIDUAL, SUM, size, SUBTRACT_MEAN, BLOCK)
    if RESIDUAL is not None:
        # Each thread reads below what others of the program have written.
        tl.debug_barrier()
        x_of_set = SUM
    inv_std = inverse_root(variance, epsilon)
    statistics = STATISTICS + row // GROUPS * 2 * GROUPS + row % GROUPS
    tl.store(statistics, mean)
    tl.store(statistics + GROUPS, inv_std)

    for member in range(0, MEMBERS, BLOCK_MEMBERS):
        members = member + tl.arange(0, BLOCK_MEMBERS)
        exists = members < MEMBERS
        channel = (row % GROUPS).to(tl.int32) * MEMBERS + members
        channel = own(channel, GROUPS * MEMBERS, programs_of_sample)
        gamma = parameter(GAMMA, channel, exists, 1.0)[:, None]
        beta = parameter(BETA, channel, exists, 0.0)[:, None]
        for start in range(0, positions, BLOCK_POSITIONS):
            place, there = _tile(start, members, positions, MEMBERS, BLOCK_POSITIONS)
            # Nobody reads it again: it shall not displace what other programs are about to.
            x = read(x_of_set, place, there, "evict_first")
            y = result((x - mean) * inv_std, gamma, beta, ACTIVATION, SLOPE)
            write(y_of_set, place, y, there, "evict_first")


@triton.jit
def backward(
    X,
    GAMMA,
    BETA,
    STATISTICS,
    DY,
    DSUM,
    DX,
    SUMS,
    positions,
    programs_of_sample,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """dx, and SUMS (outer, 2, channels) of dz * normalized and of dz."""
    row = tl.program_id(0).to(tl.int64)
    size = positions.to(tl.int64) * MEMBERS
    x_of_set, dy_of_set, dx_of_set = X + row * size, DY + row * size, DX + row * size
    if DSUM is not None:
        DSUM += row * size
    statistics = STATISTICS + row // GROUPS * 2 * GROUPS + row % GROUPS
    mean, inv_std = tl.load(statistics), tl.load(statistics + GROUPS)
    group = (row % GROUPS).to(tl.int32)
    count = size.to(tl.float32)
    product, total_of_set = 0.0, 0.0
    for member in range(0, MEMBERS, BLOCK_MEMBERS):
        members = member + tl.arange(0, BLOCK_MEMBERS)
        exists = members < MEMBERS
        channel = group * MEMBERS + members
        of_sample = own(channel, GROUPS * MEMBERS, programs_of_sample)
        gamma = parameter(GAMMA, of_sample, exists, 1.0)
        beta = parameter(BETA, of_sample, exists, 0.0)
        products = tl.zeros([BLOCK_MEMBERS, BLOCK_POSITIONS], tl.float32)
        total = tl.zeros([BLOCK_MEMBERS, BLOCK_POSITIONS], tl.float32)
        for start in range(0, positions, BLOCK_POSITIONS):
            place, there = _tile(start, members, positions, MEMBERS, BLOCK_POSITIONS)
            x = read(x_of_set, place, there)
            dy = read(dy_of_set, place, there)
            normalized = normalize(x, mean, inv_std, there)
            dz = through(dy, normalized, gamma[:, None], beta[:, None], ACTIVATION, SLOPE)
            dz = tl.where(there, dz, 0.0)
            products += dz * normalized
            total += dz
        of_channel, total_of_channel = tl.sum(products, 1), tl.sum(total, 1)
        if SUMS is not None:
            out = SUMS + row // GROUPS * 2 * GROUPS * MEMBERS + channel
            tl.store(out, of_channel, mask=exists)
            tl.store(out + GROUPS * MEMBERS, total_of_channel, mask=exists)
        product += tl.sum(of_channel * gamma, 0)
        total_of_set += tl.sum(total_of_channel * gamma, 0)
    product, mean_of_set = product / count, total_of_set / count

    for member in range(0, MEMBERS, BLOCK_MEMBERS):
        members = member + tl.arange(0, BLOCK_MEMBERS)
        exists = members < MEMBERS
        channel = own(group * MEMBERS + members, GROUPS * MEMBERS, programs_of_sample)
        gamma = parameter(GAMMA, channel, exists, 1.0)[:, None]
        beta = parameter(BETA, channel, exists, 0.0)[:, None]
        for start in range(0, positions, BLOCK_POSITIONS):
            place, there = _tile(start, members, positions, MEMBERS, BLOCK_POSITIONS)
            x = read(x_of_set, place, there, "evict_first")
            dy = read(dy_of_set, place, there, "evict_first")
            normalized = (x - mean) * inv_std
            dz = through(dy, normalized, gamma, beta, ACTIVATION, SLOPE)
            dx = dz * gamma - normalized * product
            if SUBTRACT_MEAN:
                dx -= mean_of_set
            write_gradient(dx_of_set, DSUM, place, dx * inv_std, there, "evict_first")
