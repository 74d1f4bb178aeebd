"""Rows: a set is a row of neighbours, and each of them has a gamma and a beta of its own.

A row that fits registers is read whole, several of them by a program where they are short. A longer
one is cut in pieces.
"""

import triton
import triton.language as tl

from normwise.kernels.gpu.arithmetic import (
    bounds,
    inverse_root,
    normalize,
    own,
    parameter,
    read,
    read_sum,
    result,
    through,
    write,
    write_gradient,
)


@triton.jit
def forward(
    X,
    GAMMA,
    BETA,
    RESIDUAL,
    Y,
    STATISTICS,
    SUM,
    outer,
    programs_of_sample,
    epsilon,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """y and the statistics (outer, 2, groups)."""
    group = tl.program_id(0) % GROUPS
    block = (tl.program_id(0) // GROUPS).to(tl.int64)
    first_row, end = bounds(block, BLOCK_OUTER, outer, GROUPS, programs_of_sample)
    row = first_row + tl.arange(0, BLOCK_OUTER)
    member = tl.arange(0, BLOCK_MEMBERS)
    there = (row < end)[:, None] & (member < MEMBERS)[None, :]
    start = (row * GROUPS + group) * MEMBERS
    place = start[:, None] + member[None, :]
    x = read_sum(X, RESIDUAL, SUM, place, there)
    mean = tl.zeros([BLOCK_OUTER], tl.float32)
    if SUBTRACT_MEAN:
        # From an element of the set, so that equal ones leave exactly 0.
        first = read_sum(X, RESIDUAL, None, start, row < end)
        x = tl.where(there, x - first[:, None], 0.0)
        rest = tl.sum(x, 1) / MEMBERS
        x = tl.where(there, x - rest[:, None], 0.0)
        mean = first + rest
    inv_std = inverse_root(tl.sum(x * x, 1) / MEMBERS, epsilon)
    statistics = STATISTICS + row * 2 * GROUPS + group
    tl.store(statistics, mean, mask=row < end)
    tl.store(statistics + GROUPS, inv_std, mask=row < end)
    channel = own(group * MEMBERS + member, GROUPS * MEMBERS, programs_of_sample)
    gamma = parameter(GAMMA, channel, member < MEMBERS, 1.0)[None, :]
    beta = parameter(BETA, channel, member < MEMBERS, 0.0)[None, :]
    y = result(x * inv_std[:, None], gamma, beta, ACTIVATION, SLOPE)
    write(Y, place, y, there)


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
    outer,
    chunks,
    programs_of_sample,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
):
    """dx, and SUMS (chunks, 2, channels) of dz * normalized and of dz.

    There are programs for all multiprocessors and no more, each of which takes every so manieth
    block of rows, so that there are few sums.
    """
    group = tl.program_id(0) % GROUPS
    chunk = (tl.program_id(0) // GROUPS).to(tl.int64)
    member = tl.arange(0, BLOCK_MEMBERS)
    channel = group * MEMBERS + member
    of_sample = own(channel, GROUPS * MEMBERS, programs_of_sample)
    gamma = parameter(GAMMA, of_sample, member < MEMBERS, 1.0)[None, :]
    beta = parameter(BETA, of_sample, member < MEMBERS, 0.0)[None, :]
    products = tl.zeros([BLOCK_OUTER, BLOCK_MEMBERS], tl.float32)
    total = tl.zeros([BLOCK_OUTER, BLOCK_MEMBERS], tl.float32)
    start, end = bounds(chunk, BLOCK_OUTER, outer, GROUPS, programs_of_sample)
    for first_row in range(start, end, chunks * BLOCK_OUTER):
        row = first_row + tl.arange(0, BLOCK_OUTER)
        there = (row < end)[:, None] & (member < MEMBERS)[None, :]
        place = ((row * GROUPS + group) * MEMBERS)[:, None] + member[None, :]
        x = read(X, place, there)
        dy = read(DY, place, there)
        statistics = STATISTICS + row * 2 * GROUPS + group
        mean = tl.load(statistics, mask=row < end, other=0.0)[:, None]
        inv_std = tl.load(statistics + GROUPS, mask=row < end, other=0.0)[:, None]
        normalized = normalize(x, mean, inv_std, there)
        dz = through(dy, normalized, gamma, beta, ACTIVATION, SLOPE)
        dz = tl.where(there, dz, 0.0)
        ahead = dz * gamma
        dx = ahead - normalized * (tl.sum(ahead * normalized, 1) / MEMBERS)[:, None]
        if SUBTRACT_MEAN:
            dx -= (tl.sum(ahead, 1) / MEMBERS)[:, None]
        write_gradient(DX, DSUM, place, dx * inv_std, there)
        if SUMS is not None:
            products += dz * normalized
            total += dz
    if SUMS is not None:
        channels = GROUPS * MEMBERS
        out = SUMS + chunk * 2 * channels + channel
        tl.store(out, tl.sum(products, 0), mask=member < MEMBERS)
        tl.store(out + channels, tl.sum(total, 0), mask=member < MEMBERS)


@triton.jit
def gradient(
    X,
    GAMMA,
    BETA,
    STATISTICS,
    DY,
    MEANS,
    DSUM,
    DX,
    SUMS,
    outer,
    rows_of_chunk,
    programs_of_sample,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same of rows cut in pieces, once the MEANS (outer, 2, groups) of each set are known."""
    channels: tl.constexpr = GROUPS * MEMBERS
    blocks: tl.constexpr = (channels + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(0) // blocks
    there = channel < channels
    of_sample = own(channel, channels, programs_of_sample)
    gamma = parameter(GAMMA, of_sample, there, 1.0)
    beta = parameter(BETA, of_sample, there, 0.0)
    products, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first, end = bounds(chunk.to(tl.int64), rows_of_chunk, outer, blocks, programs_of_sample)
    for row in range(first, tl.minimum(first + rows_of_chunk, end)):
        place = row * channels + channel
        x = read(X, place, there)
        dy = read(DY, place, there)
        of_set = row * 2 * GROUPS + channel // MEMBERS
        mean = tl.load(STATISTICS + of_set, mask=there, other=0.0)
        inv_std = tl.load(STATISTICS + of_set + GROUPS, mask=there, other=0.0)
        normalized = (x - mean) * inv_std
        dz = through(dy, normalized, gamma, beta, ACTIVATION, SLOPE)
        dx = dz * gamma - normalized * tl.load(MEANS + of_set, mask=there, other=0.0)
        if SUBTRACT_MEAN:
            dx -= tl.load(MEANS + of_set + GROUPS, mask=there, other=0.0)
        write_gradient(DX, DSUM, place, dx * inv_std, there)
        products += dz * normalized
        total += dz
    if SUMS is not None:
        out = SUMS + chunk.to(tl.int64) * 2 * channels + channel
        tl.store(out, products, mask=there)
        tl.store(out + channels, total, mask=there)
