"""Which kernels calculate a norm, in blocks of which shape: a function of Norm and Device alone.

A thread holds few elements, or registers spill; a program has many threads, or there are too few
loads in flight. docs/gpu.md says which blocks were measured.
"""

from typing import NamedTuple

from normwise.kernels.gpu import kept, pieces, rows, runs, whole
from normwise.kernels.gpu.launch import Device, Launch, Pass, divided, power_of_2
from normwise.norm import Norm

# Elements that a program holds at a time, as a rule.
_TILE = 4096
# The most, of a forward and of a backward pass, which holds dy and sums as well.
_MOST = 32768
_MOST_BACKWARD = 8192
# The same of a forward pass over whole samples, whose tiles are padded along each side.
_MOST_WHOLE = 16384
# Where neighbours in memory are read, a row of a tile has at least so many of them.
_NEIGHBOURS = 32
# Programs for each multiprocessor: of a loop that keeps sums, and of pieces.
_PERSISTENT = 4
_PIECES = 8


class _Sets(NamedTuple):
    """The sets of a norm as the kernels read them: (outer, channels, positions) in some order."""

    outer: int
    runs: int
    positions: int
    groups: int
    members: int
    channels_last: bool
    of_elements: bool

    @property
    def channels(self) -> int:
        return self.groups * self.members

    @property
    def count(self) -> int:
        return self.outer * self.groups


def forward(norm: Norm, device: Device) -> Pass:
    """The launches that calculate y and the statistics of x."""
    outer, before, groups, members, after = norm.geometry.extents
    if norm.geometry.keeps_after and after > 1:
        return Pass((_kept_forward(norm, outer, members, after),), {})
    if before == after == 1:
        block = power_of_2(members)
        if block <= _MOST:
            return Pass((_rows_forward(norm, outer, groups, members),), {})
    return _of_sets_forward(norm, _sets(norm), device)


def backward(norm: Norm, device: Device, dgamma: bool, dbeta: bool) -> Pass:
    """The launches that calculate dx, and where they are asked for dgamma and dbeta."""
    wanted = ("dgamma" if dgamma else None, "dbeta" if dbeta else None)
    outer, before, groups, members, after = norm.geometry.extents
    if norm.geometry.keeps_after and after > 1:
        return _kept_backward(norm, outer, members, after, device, wanted)
    if before == after == 1 and power_of_2(members) <= _MOST_BACKWARD:
        return _rows_backward(norm, outer, groups, members, device, wanted)
    return _of_sets_backward(norm, _sets(norm), device, wanted)


def _sets(norm: Norm) -> _Sets:
    outer, before, groups, members, after = norm.geometry.extents
    if before == after == 1:
        # A row is cut along its members, each with a gamma of its own.
        return _Sets(outer, 1, members, groups, 1, channels_last=False, of_elements=True)
    if after == 1:
        return _Sets(outer, 1, before, groups, members, channels_last=True, of_elements=False)
    return _Sets(outer, before, after, groups, members, channels_last=False, of_elements=False)


def _threads(elements: int, most: int = 512) -> int:
    """The threads for a tile, of 32 elements each while there are less than `most`."""
    return min(most, max(128, elements // 32))


def _parameters(norm: Norm) -> tuple:
    gamma, beta = norm.operands.gamma, norm.operands.beta
    return ("gamma" if gamma else None, "beta" if beta else None)


def _activation(norm: Norm) -> dict:
    return {"ACTIVATION": norm.activation.name, "SLOPE": float(norm.activation.slope)}


def _sum_parameters(count: int, channels: int, wanted: tuple) -> tuple[Launch, ...]:
    """The launch that sums up `sums`, if anyone asks for it."""
    if wanted == (None, None):
        return ()
    block_channels = min(32, power_of_2(channels))
    block_rows = min(power_of_2(count), 4096 // block_channels)
    return (
        Launch(
            pieces.sum_parameters,
            divided(channels, block_channels),
            ("sums",),
            wanted,
            (count, channels),
            {"BLOCK_ROWS": block_rows, "BLOCK_CHANNELS": block_channels},
            _threads(block_rows * block_channels),
        ),
    )


def _summed(launches: tuple, count: int, channels: int, wanted: tuple, scratch=None) -> Pass:
    """The pass of these launches, which leave `count` rows of sums for dgamma and dbeta."""
    scratch = scratch or {}
    if wanted != (None, None):
        scratch = {**scratch, "sums": count * 2 * channels}
    return Pass((*launches, *_sum_parameters(count, channels, wanted)), scratch)


# Rows


def _rows_blocks(members: int) -> dict:
    block = power_of_2(members)
    return {"BLOCK_OUTER": max(1, _TILE // block), "BLOCK_MEMBERS": block}


def _rows_forward(norm, outer, groups, members):
    blocks = _rows_blocks(members)
    elements = blocks["BLOCK_OUTER"] * blocks["BLOCK_MEMBERS"]
    return Launch(
        rows.forward,
        divided(outer, blocks["BLOCK_OUTER"]) * groups,
        ("x", *_parameters(norm)),
        ("y", "statistics"),
        (outer, norm.epsilon),
        {
            "GROUPS": groups,
            "MEMBERS": members,
            "SUBTRACT_MEAN": norm.subtract_mean,
            **_activation(norm),
            **blocks,
        },
        _threads(elements, 1024),
    )


def _rows_backward(norm, outer, groups, members, device, wanted):
    blocks = _rows_blocks(members)
    elements = blocks["BLOCK_OUTER"] * blocks["BLOCK_MEMBERS"]
    chunks = divided(outer, blocks["BLOCK_OUTER"])
    chunks = min(chunks, divided(device.multiprocessors * _PERSISTENT, groups))
    launch = Launch(
        rows.backward,
        chunks * groups,
        ("x", *_parameters(norm), "statistics", "dy"),
        ("dx", None if wanted == (None, None) else "sums"),
        (outer, chunks),
        {
            "GROUPS": groups,
            "MEMBERS": members,
            "SUBTRACT_MEAN": norm.subtract_mean,
            **_activation(norm),
            **blocks,
        },
        _threads(2 * elements),
    )
    return _summed((launch,), chunks, groups * members, wanted)


def _long_rows_gradient(norm, sets, device, wanted):
    block = 1024
    blocks = divided(sets.groups * sets.positions, block)
    chunks = min(sets.outer, max(1, device.multiprocessors * _PIECES // blocks))
    rows_of_chunk = divided(sets.outer, chunks)
    chunks = divided(sets.outer, rows_of_chunk)
    launch = Launch(
        rows.gradient,
        blocks * chunks,
        ("x", *_parameters(norm), "statistics", "dy", "means"),
        ("dx", None if wanted == (None, None) else "sums"),
        (sets.outer, rows_of_chunk),
        {
            "GROUPS": sets.groups,
            "MEMBERS": sets.positions,
            "SUBTRACT_MEAN": norm.subtract_mean,
            **_activation(norm),
            "BLOCK": block,
        },
        128,
    )
    return launch, chunks


# Kept


def _kept_blocks(members: int, after: int, most: int) -> dict:
    block_after = min(_NEIGHBOURS, power_of_2(after))
    return {
        "BLOCK_MEMBERS": min(power_of_2(members), most // block_after),
        "BLOCK_AFTER": block_after,
    }


def _kept_constants(norm, members, blocks):
    return {
        "MEMBERS": members,
        "SUBTRACT_MEAN": norm.subtract_mean,
        **_activation(norm),
        **blocks,
    }


def _kept_forward(norm, outer, members, after):
    blocks = _kept_blocks(members, after, _MOST)
    return Launch(
        kept.forward,
        outer * divided(after, blocks["BLOCK_AFTER"]),
        ("x", *_parameters(norm)),
        ("y", "statistics"),
        (after, norm.epsilon),
        _kept_constants(norm, members, blocks),
        _threads(blocks["BLOCK_MEMBERS"] * blocks["BLOCK_AFTER"], 1024),
    )


def _kept_backward(norm, outer, members, after, device, wanted):
    blocks = _kept_blocks(members, after, _MOST_BACKWARD)
    units = outer * divided(after, blocks["BLOCK_AFTER"])
    is_whole = blocks["BLOCK_MEMBERS"] >= members
    programs = min(units, device.multiprocessors * _PERSISTENT) if is_whole else units
    launch = Launch(
        kept.backward if is_whole else kept.backward_in_blocks,
        programs,
        ("x", *_parameters(norm), "statistics", "dy"),
        ("dx", None if wanted == (None, None) else "sums"),
        (outer, after, programs) if is_whole else (after,),
        _kept_constants(norm, members, blocks),
        _threads(2 * blocks["BLOCK_MEMBERS"] * blocks["BLOCK_AFTER"]),
    )
    return _summed((launch,), programs, members, wanted)


# Runs and columns, and rows in pieces


def _whole_blocks(sets: _Sets, most: int) -> dict | None:
    """The blocks with which a program holds whole sets, None where it cannot."""
    members, positions = power_of_2(sets.members), power_of_2(sets.positions)
    of_set = members * positions
    if sets.runs > 1 or sets.of_elements or of_set > most:
        return None
    groups = max(1, _TILE // of_set)
    if sets.channels_last:
        # Neighbours in memory are channels, of which a set may have one or two.
        groups = max(groups, min(divided(_NEIGHBOURS, members), most // of_set))
    return {
        "BLOCK_GROUPS": min(groups, power_of_2(sets.groups)),
        "BLOCK_MEMBERS": members,
        "BLOCK_POSITIONS": positions,
    }


def _whole_constants(norm, sets, blocks):
    return {
        "GROUPS": sets.groups,
        "MEMBERS": sets.members,
        "CHANNELS_LAST": sets.channels_last,
        "SUBTRACT_MEAN": norm.subtract_mean,
        **_activation(norm),
        **blocks,
    }


def _elements(blocks: dict) -> int:
    return blocks["BLOCK_GROUPS"] * blocks["BLOCK_MEMBERS"] * blocks["BLOCK_POSITIONS"]


def _has_a_program_each(sets: _Sets, device: Device) -> bool:
    """Whether there are sets enough that each has one program, which reads it twice."""
    contiguous = sets.runs == 1 and not sets.channels_last and not sets.of_elements
    return contiguous and sets.count >= 2 * device.multiprocessors


def _runs_blocks(sets: _Sets, tile: int) -> dict:
    positions = min(power_of_2(sets.positions), tile)
    return {
        "BLOCK_MEMBERS": min(power_of_2(sets.members), tile // positions),
        "BLOCK_POSITIONS": positions,
    }


class _Pieces(NamedTuple):
    """How sets are cut in pieces: how many, of how many positions, in which tiles."""

    programs: int
    numbers: tuple[int, int, int, int]
    tile: dict
    merged: dict
    merges: int
    threads: int


def _pieces(sets: _Sets, device: Device) -> _Pieces:
    """Cut each run in pieces of whole tiles, so that there are programs for the whole device."""
    if sets.channels_last:
        channels = min(power_of_2(sets.channels), 128)
        if sets.channels % channels and channels > 64:
            channels = 64
        positions = max(1, _TILE // channels)
    else:
        positions = min(power_of_2(sets.positions), _TILE)
        channels = min(power_of_2(sets.channels), _TILE // positions)
    positions = min(positions, power_of_2(sets.positions))
    others = sets.outer * sets.runs * divided(sets.channels, channels)
    of_run = max(1, divided(device.multiprocessors * _PIECES, others))
    of_run = min(of_run, divided(sets.positions, positions))
    length = divided(divided(sets.positions, of_run), positions) * positions
    of_run = divided(sets.positions, length)
    count = of_run * sets.runs
    members = min(power_of_2(sets.members), 1024)
    merged_pieces = min(power_of_2(count), 512, max(1, 2048 // members))
    groups = min(power_of_2(sets.groups), max(1, 2048 // (members * merged_pieces)))
    return _Pieces(
        others * of_run,
        (sets.positions, count, of_run, length),
        {"BLOCK_CHANNELS": channels, "BLOCK_POSITIONS": positions},
        {
            "GROUPS": sets.groups,
            "MEMBERS": sets.members,
            "BLOCK_GROUPS": groups,
            "BLOCK_MEMBERS": members,
            "BLOCK_PIECES": merged_pieces,
        },
        sets.outer * divided(sets.groups, groups),
        _threads(channels * positions),
    )


def _of_sets_forward(norm: Norm, sets: _Sets, device: Device) -> Pass:
    x, y = ("x", *_parameters(norm)), ("y", "statistics")
    if (blocks := _whole_blocks(sets, _MOST_WHOLE)) is not None:
        launch = Launch(
            whole.forward,
            sets.outer * divided(sets.groups, blocks["BLOCK_GROUPS"]),
            x,
            y,
            (sets.positions, norm.epsilon),
            _whole_constants(norm, sets, blocks),
            _threads(2 * _elements(blocks), 1024),
        )
        return Pass((launch,), {})
    if _has_a_program_each(sets, device):
        constants = {
            "GROUPS": sets.groups,
            "MEMBERS": sets.members,
            "SUBTRACT_MEAN": norm.subtract_mean,
            **_activation(norm),
            "BLOCK": 2 * _TILE,
            **_runs_blocks(sets, 2 * _TILE),
        }
        numbers = (sets.positions, norm.epsilon)
        return Pass((Launch(runs.forward, sets.count, x, y, numbers, constants, 512),), {})
    cut = _pieces(sets, device)
    moments = Launch(
        pieces.moments,
        cut.programs,
        ("x",),
        ("parts",),
        (sets.channels, *cut.numbers),
        {
            "CHANNELS_LAST": sets.channels_last,
            "SUBTRACT_MEAN": norm.subtract_mean,
            **cut.tile,
        },
        cut.threads,
    )
    merge = Launch(
        pieces.merge_moments,
        cut.merges,
        ("parts",),
        ("statistics",),
        (*cut.numbers, norm.epsilon),
        cut.merged,
        128,
    )
    apply = Launch(
        pieces.apply,
        cut.programs,
        (*x, "statistics"),
        ("y",),
        cut.numbers,
        _applied(norm, sets, cut),
        cut.threads,
    )
    scratch = {"parts": sets.outer * cut.numbers[1] * 2 * sets.channels}
    return Pass((moments, merge, apply), scratch)


def _applied(norm, sets, cut):
    return {
        "GROUPS": sets.groups,
        "MEMBERS": sets.members,
        "CHANNELS_LAST": sets.channels_last,
        "OF_ELEMENTS": sets.of_elements,
        **_activation(norm),
        **cut.tile,
    }


def _of_sets_backward(norm: Norm, sets: _Sets, device: Device, wanted: tuple) -> Pass:
    given = ("x", *_parameters(norm), "statistics", "dy")
    summed = None if wanted == (None, None) else "sums"
    if (blocks := _whole_blocks(sets, _MOST_BACKWARD)) is not None:
        launch = Launch(
            whole.backward,
            sets.outer * divided(sets.groups, blocks["BLOCK_GROUPS"]),
            given,
            ("dx", summed),
            (sets.positions,),
            _whole_constants(norm, sets, blocks),
            _threads(2 * _elements(blocks)),
        )
        return _summed((launch,), sets.outer, sets.channels, wanted)
    if _has_a_program_each(sets, device):
        constants = {
            "GROUPS": sets.groups,
            "MEMBERS": sets.members,
            "SUBTRACT_MEAN": norm.subtract_mean,
            **_activation(norm),
            **_runs_blocks(sets, _TILE),
        }
        launch = Launch(
            runs.backward, sets.count, given, ("dx", summed), (sets.positions,), constants, 512
        )
        return _summed((launch,), sets.outer, sets.channels, wanted)

    cut = _pieces(sets, device)
    sums = Launch(
        pieces.sums,
        cut.programs,
        given,
        ("parts",),
        cut.numbers,
        _applied(norm, sets, cut),
        cut.threads,
    )
    # Of rows the sums have gamma in them already, and are none of a parameter.
    merge = Launch(
        pieces.merge_sums,
        cut.merges,
        ("parts", None if sets.of_elements else _parameters(norm)[0]),
        (None if sets.of_elements else summed, "means"),
        cut.numbers,
        cut.merged,
        128,
    )
    scratch = {
        "parts": sets.outer * cut.numbers[1] * 2 * sets.channels,
        "means": sets.outer * 2 * sets.groups,
    }
    if sets.of_elements:
        launch, chunks = _long_rows_gradient(norm, sets, device, wanted)
        channels = sets.groups * sets.positions
        return _summed((sums, merge, launch), chunks, channels, wanted, scratch)
    constants = _applied(norm, sets, cut)
    constants["SUBTRACT_MEAN"] = norm.subtract_mean
    order = pieces.gradient.arg_names
    launch = Launch(
        pieces.gradient,
        cut.programs,
        (*given, "means"),
        ("dx",),
        cut.numbers,
        {name: constants[name] for name in order if name in constants},
        cut.threads,
    )
    return _summed((sums, merge, launch), sets.outer, sets.channels, wanted, scratch)
