"""Sets that are cut in pieces, a program for each, and the merges of what is found in them.

x is read as (outer, channels, positions) or (outer, positions, channels), a run of positions cut in
pieces of a length; where there is something before the channels as well as after them, the pieces
of a channel are those of several runs. Forward in three launches, backward in four:

    moments    mean and sum of squared deviations of each channel in a piece
    merge_moments    those of each set, by Chan's formula: mean and 1 / standard deviation
    apply      y

    sums       of dz * normalized and of dz, of each channel in a piece
    merge_sums    those of each channel, and with gamma those of each set
    gradient   dx
    sum_parameters    dgamma and dbeta, from the sums of each sample

where dz is the gradient before the activation. All sums are taken in an order that does not depend
on when a program runs.
"""

import triton
import triton.language as tl

from normwise.kernels.gpu.arithmetic import (
    inverse_root,
    normalize,
    not_negative,
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
def _piece(channels, pieces, pieces_of_run, length, BLOCK_CHANNELS: tl.constexpr):
    """Which piece this program reads: its sample, number, run, first position and channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    channel = (program % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    piece = (program // blocks) % pieces
    sample = (program // blocks // pieces).to(tl.int64)
    run = sample * (pieces // pieces_of_run) + piece // pieces_of_run
    start = (piece % pieces_of_run).to(tl.int64) * length
    return sample, piece, run, start, channel


@triton.jit
def places(run, channel, position, channels, positions, CHANNELS_LAST: tl.constexpr):
    """Where elements lie, for channels and positions that broadcast against each other."""
    before = run * channels * positions
    if CHANNELS_LAST:
        before += position * channels + channel
    else:
        before += channel.to(tl.int64) * positions + position
    return before


@triton.jit
def _tile(
    first,
    end,
    run,
    channel,
    channels,
    positions,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Where the elements of a tile (channels, positions) lie, and which there are."""
    position = first + tl.arange(0, BLOCK_POSITIONS)
    place = places(run, channel[:, None], position[None, :], channels, positions, CHANNELS_LAST)
    return place, (channel < channels)[:, None] & (position < end)[None, :]


@triton.jit
def moments(
    X,
    RESIDUAL,
    SUM,
    PARTS,
    channels,
    positions,
    pieces,
    pieces_of_run,
    length,
    CHANNELS_LAST: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel: PARTS (outer, pieces, 2, channels)."""
    sample, piece, run, start, channel = _piece(
        channels, pieces, pieces_of_run, length, BLOCK_CHANNELS
    )
    end = tl.minimum(start + length, positions)
    exists = channel < channels
    place, there = _tile(
        start, end, run, channel, channels, positions, CHANNELS_LAST, BLOCK_POSITIONS
    )
    x = read_sum(X, RESIDUAL, SUM, place, there)
    shift = tl.zeros([BLOCK_CHANNELS], tl.float32)
    deviation = x
    if SUBTRACT_MEAN:
        # Sums are shifted by the mean of the first tile: of no less, for an element far off would
        # leave few digits of the others; and that from one of them, so that equal ones leave 0.
        of_first = places(run, channel, start, channels, positions, CHANNELS_LAST)
        shift += read_sum(X, RESIDUAL, None, of_first, exists)
        count = tl.minimum(end - start, BLOCK_POSITIONS).to(tl.float32)
        shift += tl.sum(tl.where(there, x - shift[:, None], 0.0), 1) / count
        deviation = tl.where(there, x - shift[:, None], 0.0)
    total, squares = deviation, deviation * deviation
    for first in range(start + BLOCK_POSITIONS, end, BLOCK_POSITIONS):
        place, there = _tile(
            first, end, run, channel, channels, positions, CHANNELS_LAST, BLOCK_POSITIONS
        )
        x = read_sum(X, RESIDUAL, SUM, place, there)
        deviation = x
        if SUBTRACT_MEAN:
            deviation = tl.where(there, x - shift[:, None], 0.0)
        total += deviation
        squares += deviation * deviation
    mean, square = shift, tl.sum(squares, 1)
    if SUBTRACT_MEAN:
        count = (end - start).to(tl.float32)
        rest = tl.sum(total, 1) / count
        mean += rest
        square = not_negative(square - rest * rest * count)
    out = PARTS + (sample * pieces + piece) * 2 * channels + channel
    tl.store(out, mean, mask=exists)
    tl.store(out + channels, square, mask=exists)


@triton.jit
def _merged(
    PARTS,
    positions,
    pieces,
    pieces_of_run,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """What this program merges: sample, groups, its parts, and how many elements a set has."""
    blocks = tl.cdiv(GROUPS, BLOCK_GROUPS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    group = (tl.program_id(0) % blocks) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    count = (pieces // pieces_of_run) * positions.to(tl.float32) * MEMBERS
    return sample, group, PARTS + sample * pieces * 2 * GROUPS * MEMBERS, count


@triton.jit
def merge_moments(
    PARTS,
    STATISTICS,
    positions,
    pieces,
    pieces_of_run,
    length,
    epsilon,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """STATISTICS (outer, 2, groups) of the moments of pieces."""
    sample, group, parts, count = _merged(
        PARTS, positions, pieces, pieces_of_run, GROUPS, MEMBERS, BLOCK_GROUPS
    )
    exists = group < GROUPS
    # From one of the means, so that equal ones are met exactly.
    first = tl.load(parts + group * MEMBERS, mask=exists, other=0.0)
    total = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_PIECES], tl.float32)
    for start in range(0, MEMBERS, BLOCK_MEMBERS):
        for piece in range(0, pieces, BLOCK_PIECES):
            place, there, size = _parts(
                group, start, piece, positions, pieces, pieces_of_run, length,
                GROUPS, MEMBERS, BLOCK_MEMBERS, BLOCK_PIECES,
            )  # fmt: skip
            mean = tl.load(parts + place, mask=there, other=0.0)
            total += tl.where(there, (mean - first[:, None, None]) * size, 0.0)
    mean_of_set = first + _sum(total) / count
    squares = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_PIECES], tl.float32)
    for start in range(0, MEMBERS, BLOCK_MEMBERS):
        for piece in range(0, pieces, BLOCK_PIECES):
            place, there, size = _parts(
                group, start, piece, positions, pieces, pieces_of_run, length,
                GROUPS, MEMBERS, BLOCK_MEMBERS, BLOCK_PIECES,
            )  # fmt: skip
            mean = tl.load(parts + place, mask=there, other=0.0)
            square = tl.load(parts + place + GROUPS * MEMBERS, mask=there, other=0.0)
            rest = mean - mean_of_set[:, None, None]
            squares += tl.where(there, square + rest * rest * size, 0.0)
    out = STATISTICS + sample * 2 * GROUPS + group
    tl.store(out, mean_of_set, mask=exists)
    tl.store(out + GROUPS, inverse_root(_sum(squares) / count, epsilon), mask=exists)


@triton.jit
def _parts(
    group,
    start,
    piece,
    positions,
    pieces,
    pieces_of_run,
    length,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """Where the parts (groups, members, pieces) lie, which there are, and how many positions."""
    member = start + tl.arange(0, BLOCK_MEMBERS)
    piece = piece + tl.arange(0, BLOCK_PIECES)
    there = (group < GROUPS)[:, None, None] & (member < MEMBERS)[None, :, None]
    there = there & (piece < pieces)[None, None, :]
    channel = group[:, None, None] * MEMBERS + member[None, :, None]
    place = piece[None, None, :].to(tl.int64) * 2 * GROUPS * MEMBERS + channel
    size = tl.minimum(positions - (piece % pieces_of_run).to(tl.int64) * length, length)
    return place, there, size.to(tl.float32)[None, None, :]


@triton.jit
def _sum(tile):
    """The sum of each group of a tile (groups, members, pieces)."""
    return tl.sum(tl.sum(tile, 2), 1)


@triton.jit
def _set(STATISTICS, sample, channel, exists, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """Mean and 1 / standard deviation at each channel."""
    place = STATISTICS + sample * 2 * GROUPS + channel // MEMBERS
    mean = tl.load(place, mask=exists, other=0.0)
    return mean, tl.load(place + GROUPS, mask=exists, other=0.0)


@triton.jit
def apply(
    X,
    GAMMA,
    BETA,
    STATISTICS,
    Y,
    positions,
    pieces,
    pieces_of_run,
    length,
    programs_of_sample,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OF_ELEMENTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """y. Gamma and beta are of channels, or of each element where they are OF_ELEMENTS."""
    channels = GROUPS * MEMBERS
    sample, _, run, start, channel = _piece(channels, pieces, pieces_of_run, length, BLOCK_CHANNELS)
    end = tl.minimum(start + length, positions)
    exists = channel < channels
    mean, inv_std = _set(STATISTICS, sample, channel, exists, GROUPS, MEMBERS)
    if not OF_ELEMENTS:
        of_sample = own(channel, channels, programs_of_sample)
        gamma = parameter(GAMMA, of_sample, exists, 1.0)[:, None]
        beta = parameter(BETA, of_sample, exists, 0.0)[:, None]
    for first in range(start, end, BLOCK_POSITIONS):
        place, there = _tile(
            first, end, run, channel, channels, positions, CHANNELS_LAST, BLOCK_POSITIONS
        )
        if OF_ELEMENTS:
            position = first + tl.arange(0, BLOCK_POSITIONS)
            element = channel[:, None].to(tl.int64) * positions + position[None, :]
            element = own(element, channels.to(tl.int64) * positions, programs_of_sample)
            gamma = parameter(GAMMA, element, there, 1.0)
            beta = parameter(BETA, element, there, 0.0)
        x = read(X, place, there)
        normalized = (x - mean[:, None]) * inv_std[:, None]
        y = result(normalized, gamma, beta, ACTIVATION, SLOPE)
        write(Y, place, y, there)


@triton.jit
def sums(
    X,
    GAMMA,
    BETA,
    STATISTICS,
    DY,
    PARTS,
    positions,
    pieces,
    pieces_of_run,
    length,
    programs_of_sample,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OF_ELEMENTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Sums of dz * normalized and of dz, of each channel: PARTS (outer, pieces, 2, channels).

    Where gamma is OF_ELEMENTS it is in them already.
    """
    channels = GROUPS * MEMBERS
    sample, piece, run, start, channel = _piece(
        channels, pieces, pieces_of_run, length, BLOCK_CHANNELS
    )
    end = tl.minimum(start + length, positions)
    exists = channel < channels
    mean, inv_std = _set(STATISTICS, sample, channel, exists, GROUPS, MEMBERS)
    if not OF_ELEMENTS:
        of_sample = own(channel, channels, programs_of_sample)
        gamma = parameter(GAMMA, of_sample, exists, 1.0)[:, None]
        beta = parameter(BETA, of_sample, exists, 0.0)[:, None]
    products = tl.zeros([BLOCK_CHANNELS, BLOCK_POSITIONS], tl.float32)
    total = tl.zeros([BLOCK_CHANNELS, BLOCK_POSITIONS], tl.float32)
    for first in range(start, end, BLOCK_POSITIONS):
        place, there = _tile(
            first, end, run, channel, channels, positions, CHANNELS_LAST, BLOCK_POSITIONS
        )
        if OF_ELEMENTS:
            position = first + tl.arange(0, BLOCK_POSITIONS)
            element = channel[:, None].to(tl.int64) * positions + position[None, :]
            element = own(element, channels.to(tl.int64) * positions, programs_of_sample)
            gamma = parameter(GAMMA, element, there, 1.0)
            beta = parameter(BETA, element, there, 0.0)
        x = read(X, place, there)
        dy = read(DY, place, there)
        normalized = normalize(x, mean[:, None], inv_std[:, None], there)
        dz = through(dy, normalized, gamma, beta, ACTIVATION, SLOPE)
        if OF_ELEMENTS:
            dz = dz * gamma
        dz = tl.where(there, dz, 0.0)
        products += dz * normalized
        total += dz
    out = PARTS + (sample * pieces + piece) * 2 * channels + channel
    tl.store(out, tl.sum(products, 1), mask=exists)
    tl.store(out + channels, tl.sum(total, 1), mask=exists)


@triton.jit
def merge_sums(
    PARTS,
    GAMMA,
    SUMS,
    MEANS,
    positions,
    pieces,
    pieces_of_run,
    length,
    programs_of_sample,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """SUMS (outer, 2, channels) of the pieces, and MEANS (outer, 2, groups) with gamma."""
    channels = GROUPS * MEMBERS
    sample, group, parts, count = _merged(
        PARTS, positions, pieces, pieces_of_run, GROUPS, MEMBERS, BLOCK_GROUPS
    )
    products_of_set = tl.zeros([BLOCK_GROUPS], tl.float32)
    total_of_set = tl.zeros([BLOCK_GROUPS], tl.float32)
    for start in range(0, MEMBERS, BLOCK_MEMBERS):
        products = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_PIECES], tl.float32)
        total = tl.zeros([BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_PIECES], tl.float32)
        for piece in range(0, pieces, BLOCK_PIECES):
            place, there, _ = _parts(
                group, start, piece, positions, pieces, pieces_of_run, length,
                GROUPS, MEMBERS, BLOCK_MEMBERS, BLOCK_PIECES,
            )  # fmt: skip
            products += tl.load(parts + place, mask=there, other=0.0)
            total += tl.load(parts + place + channels, mask=there, other=0.0)
        of_channel, total_of_channel = tl.sum(products, 2), tl.sum(total, 2)
        member = start + tl.arange(0, BLOCK_MEMBERS)
        channel = group[:, None] * MEMBERS + member[None, :]
        exists = (group < GROUPS)[:, None] & (member < MEMBERS)[None, :]
        if SUMS is not None:
            out = SUMS + sample * 2 * channels + channel
            tl.store(out, of_channel, mask=exists)
            tl.store(out + channels, total_of_channel, mask=exists)
        channel = own(channel, channels, programs_of_sample)
        gamma = parameter(GAMMA, channel, exists, 1.0)
        products_of_set += tl.sum(of_channel * gamma, 1)
        total_of_set += tl.sum(total_of_channel * gamma, 1)
    out = MEANS + sample * 2 * GROUPS + group
    tl.store(out, products_of_set / count, mask=group < GROUPS)
    tl.store(out + GROUPS, total_of_set / count, mask=group < GROUPS)


@triton.jit
def merge_sums_of_rows(
    PARTS,
    MEANS,
    positions,
    pieces,
    pieces_of_run,
    length,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
):
    """The MEANS of sums that have gamma in them."""
    merge_sums(
        PARTS, None, None, MEANS, positions, pieces, pieces_of_run, length, None,
        GROUPS, MEMBERS, BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_PIECES,
    )  # fmt: skip


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
    positions,
    pieces,
    pieces_of_run,
    length,
    programs_of_sample,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """dx, where gamma and beta are of channels."""
    channels = GROUPS * MEMBERS
    sample, _, run, start, channel = _piece(channels, pieces, pieces_of_run, length, BLOCK_CHANNELS)
    end = tl.minimum(start + length, positions)
    exists = channel < channels
    mean, inv_std = _set(STATISTICS, sample, channel, exists, GROUPS, MEMBERS)
    product, total = _set(MEANS, sample, channel, exists, GROUPS, MEMBERS)
    of_sample = own(channel, channels, programs_of_sample)
    gamma = parameter(GAMMA, of_sample, exists, 1.0)
    beta = parameter(BETA, of_sample, exists, 0.0)
    for first in range(start, end, BLOCK_POSITIONS):
        place, there = _tile(
            first, end, run, channel, channels, positions, CHANNELS_LAST, BLOCK_POSITIONS
        )
        x = read(X, place, there)
        dy = read(DY, place, there)
        normalized = (x - mean[:, None]) * inv_std[:, None]
        dz = through(dy, normalized, gamma[:, None], beta[:, None], ACTIVATION, SLOPE)
        dx = dz * gamma[:, None] - normalized * product[:, None]
        if SUBTRACT_MEAN:
            dx -= total[:, None]
        write_gradient(DX, DSUM, place, dx * inv_std[:, None], there)


@triton.jit
def sum_parameters(
    SUMS,
    DGAMMA,
    DBETA,
    rows,
    channels,
    programs_of_sample,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """dgamma and dbeta (channels,): the sums over the rows of SUMS (rows, 2, channels).

    Where each sample has its own, they and SUMS have one axis more in front.
    """
    program = tl.program_id(0).to(tl.int64)
    if programs_of_sample is not None:
        SUMS += program // programs_of_sample * rows * 2 * channels
        program = program % programs_of_sample
    channel = program * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    dgamma = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    dbeta = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        there = (row < rows)[:, None] & (channel < channels)[None, :]
        place = row[:, None] * 2 * channels + channel[None, :]
        if DGAMMA is not None:
            dgamma += tl.load(SUMS + place, mask=there, other=0.0)
        if DBETA is not None:
            dbeta += tl.load(SUMS + place + channels, mask=there, other=0.0)
    of_sample = own(channel, channels, programs_of_sample)
    if DGAMMA is not None:
        tl.store(DGAMMA + of_sample, tl.sum(dgamma, 0), mask=channel < channels)
    if DBETA is not None:
        tl.store(DBETA + of_sample, tl.sum(dbeta, 0), mask=channel < channels)
