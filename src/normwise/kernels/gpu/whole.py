"""Sets that fit into the registers of one program, which reads each element once.

A program has some groups of a sample, in a tile (groups, members, positions), whether the channels
lie first or last.
"""

import triton
import triton.language as tl

from normwise.kernels.gpu.arithmetic import (
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
from normwise.kernels.gpu.pieces import places


@triton.jit
def _tile(
    positions,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """What this program has: sample and groups, and channels, places and which there are."""
    blocks: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    group = (tl.program_id(0) % blocks) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    member = tl.arange(0, BLOCK_MEMBERS)
    position = tl.arange(0, BLOCK_POSITIONS).to(tl.int64)
    channel = group[:, None] * MEMBERS + member[None, :]
    exists = (group < GROUPS)[:, None] & (member < MEMBERS)[None, :]
    there = exists[:, :, None] & (position < positions)[None, None, :]
    place = places(
        sample,
        channel[:, :, None],
        position[None, None, :],
        GROUPS * MEMBERS,
        positions,
        CHANNELS_LAST,
    )
    return sample, group, channel, exists, place, there


@triton.jit
def _sum(tile):
    """The sum of each group, to broadcast against the tile."""
    return tl.sum(tl.sum(tile, 2), 1)[:, None, None]


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
    CHANNELS_LAST: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """y and the statistics (outer, 2, groups)."""
    sample, group, channel, exists, place, there = _tile(
        positions, GROUPS, MEMBERS, CHANNELS_LAST, BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_POSITIONS
    )
    count = MEMBERS * positions.to(tl.float32)
    x = read_sum(X, RESIDUAL, SUM, place, there)
    mean = tl.zeros([BLOCK_GROUPS, 1, 1], tl.float32)
    if SUBTRACT_MEAN:
        # From an element of the set, so that equal ones leave exactly 0.
        first = places(sample, group * MEMBERS, 0, GROUPS * MEMBERS, positions, CHANNELS_LAST)
        first = read_sum(X, RESIDUAL, None, first, group < GROUPS)[:, None, None]
        x = tl.where(there, x - first, 0.0)
        rest = _sum(x) / count
        x = tl.where(there, x - rest, 0.0)
        mean = first + rest
    inv_std = inverse_root(_sum(x * x) / count, epsilon)
    channel = own(channel, GROUPS * MEMBERS, programs_of_sample)
    gamma = parameter(GAMMA, channel, exists, 1.0)[:, :, None]
    beta = parameter(BETA, channel, exists, 0.0)[:, :, None]
    y = result(x * inv_std, gamma, beta, ACTIVATION, SLOPE)
    write(Y, place, y, there)
    out = (STATISTICS + sample * 2 * GROUPS + group)[:, None, None]
    tl.store(out, mean, mask=(group < GROUPS)[:, None, None])
    tl.store(out + GROUPS, inv_std, mask=(group < GROUPS)[:, None, None])


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
    CHANNELS_LAST: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """dx, and SUMS (outer, 2, channels) of dz * normalized and of dz."""
    sample, group, channel, exists, place, there = _tile(
        positions, GROUPS, MEMBERS, CHANNELS_LAST, BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_POSITIONS
    )
    count = MEMBERS * positions.to(tl.float32)
    statistics = (STATISTICS + sample * 2 * GROUPS + group)[:, None, None]
    known = (group < GROUPS)[:, None, None]
    mean = tl.load(statistics, mask=known, other=0.0)
    inv_std = tl.load(statistics + GROUPS, mask=known, other=0.0)
    of_sample = own(channel, GROUPS * MEMBERS, programs_of_sample)
    gamma = parameter(GAMMA, of_sample, exists, 1.0)
    beta = parameter(BETA, of_sample, exists, 0.0)[:, :, None]
    x = read(X, place, there)
    dy = read(DY, place, there)
    normalized = normalize(x, mean, inv_std, there)
    dz = through(dy, normalized, gamma[:, :, None], beta, ACTIVATION, SLOPE)
    dz = tl.where(there, dz, 0.0)
    products, total = tl.sum(dz * normalized, 2), tl.sum(dz, 2)
    if SUMS is not None:
        out = SUMS + sample * 2 * GROUPS * MEMBERS + channel
        tl.store(out, products, mask=exists)
        tl.store(out + GROUPS * MEMBERS, total, mask=exists)
    product = tl.sum(products * gamma, 1)[:, None, None] / count
    dx = dz * gamma[:, :, None] - normalized * product
    if SUBTRACT_MEAN:
        dx -= tl.sum(total * gamma, 1)[:, None, None] / count
    write_gradient(DX, DSUM, place, dx * inv_std, there)
