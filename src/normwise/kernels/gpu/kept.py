"""Kept: positions lie after the channels, and each of them has a set of its own.

A program takes some neighbouring positions of a sample with all their channels, in registers where
those are few enough, and else in blocks, twice, the second time from the L2.
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
def _positions(unit, after, BLOCK_AFTER: tl.constexpr):
    """The sample of a unit of positions, the positions, and which there are."""
    units = tl.cdiv(after, BLOCK_AFTER)
    position = (unit % units) * BLOCK_AFTER + tl.arange(0, BLOCK_AFTER)
    return (unit // units).to(tl.int64), position, position < after


@triton.jit
def _block(start, position, exists, after, MEMBERS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr):
    """The members of a block, where its elements lie in a sample, and which there are."""
    member = start + tl.arange(0, BLOCK_MEMBERS)
    place = member[:, None].to(tl.int64) * after + position[None, :]
    return member, place, (member < MEMBERS)[:, None] & exists[None, :]


@triton.jit
def forward(
    X,
    GAMMA,
    BETA,
    RESIDUAL,
    Y,
    STATISTICS,
    SUM,
    after,
    programs_of_sample,
    epsilon,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_AFTER: tl.constexpr,
):
    """y and the statistics (outer, 2, after)."""
    sample, position, exists = _positions(tl.program_id(0), after, BLOCK_AFTER)
    x_of_sample, y_of_sample = X + sample * MEMBERS * after, Y + sample * MEMBERS * after
    if RESIDUAL is not None:
        RESIDUAL += sample * MEMBERS * after
        SUM += sample * MEMBERS * after
    WHOLE: tl.constexpr = BLOCK_MEMBERS >= MEMBERS
    member, place, there = _block(0, position, exists, after, MEMBERS, BLOCK_MEMBERS)
    x = read_sum(x_of_sample, RESIDUAL, SUM, place, there)
    mean = tl.zeros([BLOCK_AFTER], tl.float32)
    if SUBTRACT_MEAN:
        # From an element of the set, so that equal ones leave exactly 0.
        first = read_sum(x_of_sample, RESIDUAL, None, position, exists)
        total = tl.where(there, x - first[None, :], 0.0)
        for start in range(BLOCK_MEMBERS, MEMBERS, BLOCK_MEMBERS):
            member, place, there = _block(start, position, exists, after, MEMBERS, BLOCK_MEMBERS)
            each = read_sum(x_of_sample, RESIDUAL, None, place, there)
            total += tl.where(there, each - first[None, :], 0.0)
        mean = first + tl.sum(total, 0) / MEMBERS
    member, place, there = _block(0, position, exists, after, MEMBERS, BLOCK_MEMBERS)
    x = tl.where(there, x - mean[None, :], 0.0)
    squares = x * x
    for start in range(BLOCK_MEMBERS, MEMBERS, BLOCK_MEMBERS):
        member, place, there = _block(start, position, exists, after, MEMBERS, BLOCK_MEMBERS)
        each = read_sum(x_of_sample, RESIDUAL, SUM, place, there)
        each = tl.where(there, each - mean[None, :], 0.0)
        squares += each * each
    inv_std = inverse_root(tl.sum(squares, 0) / MEMBERS, epsilon)
    statistics = STATISTICS + sample * 2 * after + position
    tl.store(statistics, mean, mask=exists)
    tl.store(statistics + after, inv_std, mask=exists)
    for start in range(0, MEMBERS, BLOCK_MEMBERS):
        member, place, there = _block(start, position, exists, after, MEMBERS, BLOCK_MEMBERS)
        if not WHOLE:
            x = read_sum(x_of_sample, RESIDUAL, None, place, there)
            x = x - mean[None, :]
        of_sample = own(member, MEMBERS, programs_of_sample)
        gamma = parameter(GAMMA, of_sample, member < MEMBERS, 1.0)[:, None]
        beta = parameter(BETA, of_sample, member < MEMBERS, 0.0)[:, None]
        y = result(x * inv_std[None, :], gamma, beta, ACTIVATION, SLOPE)
        write(y_of_sample, place, y, there)


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
    after,
    programs,
    programs_of_sample,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_AFTER: tl.constexpr,
):
    """dx, and SUMS (programs, 2, channels) of dz * normalized and of dz.

    There are programs for all multiprocessors and no more, each of which takes every so manieth
    unit of positions, so that there are few sums.
    """
    program = tl.program_id(0)
    member = tl.arange(0, BLOCK_MEMBERS)
    of_sample = own(member, MEMBERS, programs_of_sample)
    gamma = parameter(GAMMA, of_sample, member < MEMBERS, 1.0)[:, None]
    beta = parameter(BETA, of_sample, member < MEMBERS, 0.0)[:, None]
    products = tl.zeros([BLOCK_MEMBERS, BLOCK_AFTER], tl.float32)
    total = tl.zeros([BLOCK_MEMBERS, BLOCK_AFTER], tl.float32)
    units = outer * tl.cdiv(after, BLOCK_AFTER)
    start, end = bounds(program, 1, units, 1, programs_of_sample)
    for unit in range(start, end, programs):
        sample, position, exists = _positions(unit, after, BLOCK_AFTER)
        _, place, there = _block(0, position, exists, after, MEMBERS, BLOCK_MEMBERS)
        place += sample * MEMBERS * after
        x = read(X, place, there)
        dy = read(DY, place, there)
        statistics = STATISTICS + sample * 2 * after + position
        mean = tl.load(statistics, mask=exists, other=0.0)[None, :]
        inv_std = tl.load(statistics + after, mask=exists, other=0.0)[None, :]
        normalized = normalize(x, mean, inv_std, there)
        dz = through(dy, normalized, gamma, beta, ACTIVATION, SLOPE)
        dz = tl.where(there, dz, 0.0)
        ahead = dz * gamma
        dx = ahead - normalized * (tl.sum(ahead * normalized, 0) / MEMBERS)[None, :]
        if SUBTRACT_MEAN:
            dx -= (tl.sum(ahead, 0) / MEMBERS)[None, :]
        write_gradient(DX, DSUM, place, dx * inv_std, there)
        if SUMS is not None:
            products += dz * normalized
            total += dz
    if SUMS is not None:
        out = SUMS + program.to(tl.int64) * 2 * MEMBERS + member
        tl.store(out, tl.sum(products, 1), mask=member < MEMBERS)
        tl.store(out + MEMBERS, tl.sum(total, 1), mask=member < MEMBERS)


@triton.jit
def backward_in_blocks(
    X,
    GAMMA,
    BETA,
    STATISTICS,
    DY,
    DSUM,
    DX,
    SUMS,
    after,
    programs_of_sample,
    MEMBERS: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_AFTER: tl.constexpr,
):
    """The same of sets too large for registers, a program for each unit of positions."""
    sample, position, exists = _positions(tl.program_id(0), after, BLOCK_AFTER)
    start_of_sample = sample * MEMBERS * after
    x_of_sample, dy_of_sample, dx_of_sample = (
        X + start_of_sample,
        DY + start_of_sample,
        DX + start_of_sample,
    )
    if DSUM is not None:
        DSUM += start_of_sample
    statistics = STATISTICS + sample * 2 * after + position
    mean = tl.load(statistics, mask=exists, other=0.0)[None, :]
    inv_std = tl.load(statistics + after, mask=exists, other=0.0)[None, :]
    product = tl.zeros([1, BLOCK_AFTER], tl.float32)
    total = tl.zeros([1, BLOCK_AFTER], tl.float32)
    for start in range(0, MEMBERS, BLOCK_MEMBERS):
        member, place, there = _block(start, position, exists, after, MEMBERS, BLOCK_MEMBERS)
        of_sample = own(member, MEMBERS, programs_of_sample)
        gamma = parameter(GAMMA, of_sample, member < MEMBERS, 1.0)[:, None]
        beta = parameter(BETA, of_sample, member < MEMBERS, 0.0)[:, None]
        x = read(x_of_sample, place, there)
        dy = read(dy_of_sample, place, there)
        normalized = normalize(x, mean, inv_std, there)
        dz = through(dy, normalized, gamma, beta, ACTIVATION, SLOPE)
        dz = tl.where(there, dz, 0.0)
        if SUMS is not None:
            out = SUMS + tl.program_id(0).to(tl.int64) * 2 * MEMBERS + member
            tl.store(out, tl.sum(dz * normalized, 1), mask=member < MEMBERS)
            tl.store(out + MEMBERS, tl.sum(dz, 1), mask=member < MEMBERS)
        ahead = dz * gamma
        product += tl.sum(ahead * normalized, 0)[None, :]
        total += tl.sum(ahead, 0)[None, :]
    for start in range(0, MEMBERS, BLOCK_MEMBERS):
        member, place, there = _block(start, position, exists, after, MEMBERS, BLOCK_MEMBERS)
        of_sample = own(member, MEMBERS, programs_of_sample)
        gamma = parameter(GAMMA, of_sample, member < MEMBERS, 1.0)[:, None]
        beta = parameter(BETA, of_sample, member < MEMBERS, 0.0)[:, None]
        x = read(x_of_sample, place, there)
        dy = read(dy_of_sample, place, there)
        normalized = (x - mean) * inv_std
        dz = through(dy, normalized, gamma, beta, ACTIVATION, SLOPE)
        dx = dz * gamma - normalized * (product / MEMBERS)
        if SUBTRACT_MEAN:
            dx -= total / MEMBERS
        write_gradient(dx_of_sample, DSUM, place, dx * inv_std, there)
