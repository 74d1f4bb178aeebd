"""Which kernels calculate a norm, in blocks of which shape: a function of Norm and Device alone.

A sample is calculated in the same way however many there are, so that its result is the same too.
A thread holds few elements, or registers spill; a program has many threads, or too few loads are
under way at a time.
"""

from typing import NamedTuple

from normwise.kernels.gpu import kept, pieces, rows, runs, whole
from normwise.kernels.gpu.launch import (
    Device,
    Launch,
    Pass,
    divided,
    parameters_of,
    power_of_2,
)
from normwise.norm import Norm

# Elements that a program holds at a time, as a rule.
_TILE = 4096
# The most, of a forward and of a backward pass, which holds dy and sums as well.
_MOST = 32768
_MOST_BACKWARD = 8192
# The most of a forward pass over whole samples, whose tiles are padded along each side.
_MOST_WHOLE = 16384
# So many neighbours in memory are read at a time, if there are.
_NEIGHBOURS = 32
# The most that a program reads alone, twice; more is cut in pieces.
_MOST_ALONE = 131072
# Programs for each multiprocessor: of loops that keep sums, and of the pieces of one sample.
_PERSISTENT = 4
_PIECES = 8
# The tiles of a piece, if there are so many: fewer leave too much to merge.
_TILES = 4
# The rows that a program sums for dgamma and dbeta of one sample, if there are so many: the same.
_ROWS = 32


def forward(norm: Norm, device: Device) -> Pass:
    """The launches that calculate y and the statistics of x."""
    call = _Call(norm, device)
    way = {
        "rows": _rows_forward,
        "kept": _kept_forward,
        "whole": _whole_forward,
        "runs": _runs_forward,
        "pieces": _pieces_forward,
    }
    return way[_pattern(norm, call.sets, _MOST, _MOST_WHOLE)](call)


def backward(norm: Norm, device: Device, dgamma: bool, dbeta: bool, dsum: bool = False) -> Pass:
    """The launches that calculate dx, with dsum in it, and if asked for dgamma and dbeta."""
    call = _Call(norm, device, dgamma, dbeta, dsum)
    way = {
        "rows": _rows_backward,
        "kept": _kept_backward,
        "whole": _whole_backward,
        "runs": _runs_backward,
        "pieces": _pieces_backward,
    }
    return way[_pattern(norm, call.sets, _MOST_BACKWARD, _MOST_BACKWARD)](call)


def _pattern(norm: Norm, sets: "_Sets", most_of_row: int, most_of_set: int) -> str:
    """Whose kernels calculate a norm, by the file's name.

    Args:
        norm, sets: what is calculated.
        most_of_row, most_of_set: the elements that a program can hold of a row, and of another set.
    """
    if norm.geometry.pattern == "kept":
        return "kept"
    if sets.of_elements and power_of_2(sets.positions) <= most_of_row:
        return "rows"
    if sets.fit(most_of_set):
        return "whole"
    return "runs" if sets.fit_a_program else "pieces"


def _threads(elements: int, each: int = 32, most: int = 1024) -> int:
    """The threads for a tile, of which each holds so many elements unless that takes too many."""
    return min(most, max(128, elements // each))


def _samples(norm: Norm) -> int:
    """How many samples have gamma and beta of their own, 1 where all share them."""
    return norm.geometry.shape[0] if norm.per_sample else 1


class _Call:
    """What all launches of a pass have in common.

    Attributes:
        samples: that have gamma and beta of their own, 1 where all share them.
        outer, sets: of one of these. So each has programs of its own, and as many in every batch.
    """

    def __init__(
        self,
        norm: Norm,
        device: Device,
        dgamma: bool = False,
        dbeta: bool = False,
        dsum: bool = False,
    ):
        self.device = device
        present = {
            "gamma": norm.operands.gamma,
            "beta": norm.operands.beta,
            "residual": norm.operands.residual,
            "sum": norm.operands.residual,
            "dsum": dsum,
            "dgamma": dgamma,
            "dbeta": dbeta,
            "sums": dgamma or dbeta,
        }
        self._absent = {name for name, is_there in present.items() if not is_there}
        self.has_sums = present["sums"]
        _, _, self.groups, self.members, self.after = norm.geometry.extents
        self.sets = _Sets.of(norm)
        self.outer, self.samples = self.sets.outer, _samples(norm)
        self.per_sample, self.has_residual = norm.per_sample, norm.operands.residual
        self._values = {
            "epsilon": norm.epsilon,
            "GROUPS": self.groups,
            "MEMBERS": self.members,
            "SUBTRACT_MEAN": norm.subtract_mean,
            "ACTIVATION": norm.activation.name,
            "SLOPE": float(norm.activation.slope),
        }

    def threads(self, elements: int) -> int:
        """The threads for a tile of x in a loop, where a residual takes registers too."""
        return _threads(elements, each=16 if self.has_residual else 32)

    def launch(self, kernel, programs: int, threads: int, writes: tuple, /, **values) -> Launch:
        """A launch of a kernel, whose parameters say by their names what they are given.

        A buffer is one that the kernel writes, or else has a name in capitals and no value. The
        programs are those of a sample, if each has gamma and beta of its own.
        """
        of_sample = programs if self.per_sample else None
        values = {**self._values, "programs_of_sample": of_sample, **values}
        names, constants = parameters_of(kernel)
        numbers = [name for name in names if name in values]
        buffers = [name.lower() for name in names if name not in values]
        reads = buffers[: -len(writes)]
        if buffers[-len(writes) :] != list(writes):
            raise TypeError(f"{kernel.__name__} writes {buffers[-len(writes) :]}, not {writes}")
        return Launch(
            kernel,
            self.samples * programs,
            tuple(None if name in self._absent else name for name in reads),
            tuple(None if name in self._absent else name for name in writes),
            tuple(values[name] for name in numbers),
            {name: values[name] for name in constants},
            threads,
        )

    def summed(self, launches: tuple, count: int, channels: int, scratch=None) -> Pass:
        """The pass of launches that leave `count` sums for each channel's dgamma and dbeta."""
        scratch = scratch or {}
        if not self.has_sums:
            return self.with_scratch(launches, scratch)
        block_channels = min(32, power_of_2(channels))
        block_rows = min(power_of_2(count), _TILE // block_channels)
        last = self.launch(
            pieces.sum_parameters,
            divided(channels, block_channels),
            _threads(block_rows * block_channels),
            ("dgamma", "dbeta"),
            rows=count,
            channels=channels,
            BLOCK_ROWS=block_rows,
            BLOCK_CHANNELS=block_channels,
        )
        return self.with_scratch((*launches, last), {**scratch, "sums": count * 2 * channels})

    def with_scratch(self, launches: tuple, scratch: dict) -> Pass:
        """The pass of launches with scratch for each sample."""
        return Pass(launches, {name: self.samples * each for name, each in scratch.items()})


# Rows


def _rows_blocks(call: _Call) -> tuple[int, int]:
    """How many rows a program reads at a time, and how many members."""
    block = power_of_2(call.members)
    block_outer = max(1, _TILE // block)
    return min(block_outer, power_of_2(call.outer)) if call.per_sample else block_outer, block


def _chunks(call: _Call, block_outer: int, most: int) -> int:
    """How many chunks of rows have sums of their own for dgamma and dbeta."""
    rows = max(block_outer, _ROWS) if call.per_sample else block_outer
    return min(divided(call.outer, rows), most)


def _rows_forward(call: _Call) -> Pass:
    block_outer, block = _rows_blocks(call)
    launch = call.launch(
        rows.forward,
        divided(call.outer, block_outer) * call.groups,
        _threads(block_outer * block),
        ("y", "statistics", "sum"),
        outer=call.outer,
        BLOCK_OUTER=block_outer,
        BLOCK_MEMBERS=block,
    )
    return Pass((launch,), {})


def _rows_backward(call: _Call) -> Pass:
    block_outer, block = _rows_blocks(call)
    most = divided(call.device.multiprocessors * _PERSISTENT, call.groups)
    chunks = _chunks(call, block_outer, most)
    launch = call.launch(
        rows.backward,
        chunks * call.groups,
        _threads(block_outer * block, each=16),
        ("dx", "sums"),
        outer=call.outer,
        chunks=chunks,
        BLOCK_OUTER=block_outer,
        BLOCK_MEMBERS=block,
    )
    return call.summed((launch,), chunks, call.groups * call.members)


# Kept


def _kept_blocks(members: int, after: int, most: int) -> dict:
    block_after = min(_NEIGHBOURS, power_of_2(after))
    block_members = power_of_2(members)
    if block_members * block_after > most:
        block_members = _TILE // block_after
    return {"BLOCK_MEMBERS": block_members, "BLOCK_AFTER": block_after}


def _kept_forward(call: _Call) -> Pass:
    outer, members, after = call.outer, call.members, call.after
    blocks = _kept_blocks(members, after, _MOST)
    launch = call.launch(
        kept.forward,
        outer * divided(after, blocks["BLOCK_AFTER"]),
        call.threads(blocks["BLOCK_MEMBERS"] * blocks["BLOCK_AFTER"]),
        ("y", "statistics", "sum"),
        after=after,
        **blocks,
    )
    return Pass((launch,), {})


def _kept_backward(call: _Call) -> Pass:
    outer, members, after = call.outer, call.members, call.after
    blocks = _kept_blocks(members, after, _MOST_BACKWARD)
    threads = _threads(blocks["BLOCK_MEMBERS"] * blocks["BLOCK_AFTER"], each=16)
    programs = outer * divided(after, blocks["BLOCK_AFTER"])
    kernel = kept.backward_in_blocks
    if blocks["BLOCK_MEMBERS"] >= members:
        programs = min(programs, call.device.multiprocessors * _PERSISTENT)
        kernel = kept.backward
    given = {"outer": outer, "after": after, "programs": programs}
    launch = call.launch(kernel, programs, threads, ("dx", "sums"), **given, **blocks)
    return call.summed((launch,), programs, members)


# Runs and columns, and long rows


class _Sets(NamedTuple):
    """The sets of a norm as (outer, channels, positions) or (outer, positions, channels).

    Args:
        outer: how many samples, or where these have gamma and beta of their own, of one how many.
        runs: of positions in a sample, where there is something before its channels, and after.
        positions: of a run.
        groups, members: of the channels.
        channels_last: whether these lie last.
        of_elements: whether these are the sets themselves, rows with a gamma for each position.
    """

    outer: int
    runs: int
    positions: int
    groups: int
    members: int
    channels_last: bool = False
    of_elements: bool = False

    @classmethod
    def of(cls, norm: Norm) -> "_Sets":
        outer, before, groups, members, after = norm.geometry.extents
        outer //= _samples(norm)
        pattern = norm.geometry.pattern
        if pattern == "rows":
            return cls(outer, 1, members, groups, 1, of_elements=True)
        if pattern == "columns":
            return cls(outer, 1, before, groups, members, channels_last=True)
        return cls(outer, before, after, groups, members)

    @property
    def channels(self) -> int:
        return self.groups * self.members

    def fit(self, most: int) -> bool:
        """Whether a program can hold a whole set, padded to powers of 2."""
        padded = power_of_2(self.members) * power_of_2(self.positions)
        return self.runs == 1 and not self.of_elements and padded <= most

    @property
    def fit_a_program(self) -> bool:
        """Whether each is one run, short enough for one program to read it twice."""
        contiguous = self.runs == 1 and not self.channels_last and not self.of_elements
        return contiguous and self.members * self.positions <= _MOST_ALONE


def _whole_blocks(sets: _Sets, most: int) -> dict:
    members, positions = power_of_2(sets.members), power_of_2(sets.positions)
    groups = max(1, _TILE // (members * positions))
    if sets.channels_last:
        # The neighbours in memory are channels.
        groups = max(groups, min(divided(_NEIGHBOURS, members), most // (members * positions)))
    groups = min(groups, power_of_2(sets.groups))
    return {"BLOCK_GROUPS": groups, "BLOCK_MEMBERS": members, "BLOCK_POSITIONS": positions}


def _whole(call: _Call, kernel, most: int, writes: tuple) -> Launch:
    sets = call.sets
    blocks = _whole_blocks(sets, most)
    groups, members, positions = blocks.values()
    return call.launch(
        kernel,
        sets.outer * divided(sets.groups, groups),
        _threads(groups * members * positions, each=16),
        writes,
        positions=sets.positions,
        CHANNELS_LAST=sets.channels_last,
        **blocks,
    )


def _whole_forward(call: _Call) -> Pass:
    launch = _whole(call, whole.forward, _MOST_WHOLE, ("y", "statistics", "sum"))
    return Pass((launch,), {})


def _whole_backward(call: _Call) -> Pass:
    launch = _whole(call, whole.backward, _MOST_BACKWARD, ("dx", "sums"))
    return call.summed((launch,), call.outer, call.sets.channels)


def _runs(call: _Call, kernel, tile: int, writes: tuple) -> Launch:
    sets = call.sets
    positions = min(power_of_2(sets.positions), tile)
    return call.launch(
        kernel,
        sets.outer * sets.groups,
        512,
        writes,
        positions=sets.positions,
        BLOCK=tile,
        BLOCK_MEMBERS=min(power_of_2(sets.members), tile // positions),
        BLOCK_POSITIONS=positions,
    )


def _runs_forward(call: _Call) -> Pass:
    return Pass((_runs(call, runs.forward, 2 * _TILE, ("y", "statistics", "sum")),), {})


def _runs_backward(call: _Call) -> Pass:
    launch = _runs(call, runs.backward, _TILE, ("dx", "sums"))
    return call.summed((launch,), call.outer, call.sets.channels)


class _Pieces:
    """How sets are cut in pieces: what the kernels of pieces.py are told of it.

    Attributes:
        count: the pieces of a sample.
        programs, threads, tile: of the kernels that read pieces.
        merges, merged: the programs and blocks of those that merge them.
    """

    def __init__(self, sets: _Sets, device: Device):
        channels, positions = _tile(sets)
        blocks = divided(sets.channels, channels)
        wanted = divided(device.multiprocessors * _PIECES, blocks * sets.runs)
        most = divided(sets.positions, positions * _TILES)
        length = divided(divided(sets.positions, min(wanted, most)), positions) * positions
        of_run = divided(sets.positions, length)
        self.count = of_run * sets.runs
        self.programs = sets.outer * self.count * blocks
        self.threads = _threads(channels * positions)
        cut = {
            "positions": sets.positions,
            "pieces": self.count,
            "pieces_of_run": of_run,
            "length": length,
            "GROUPS": sets.groups,
            "MEMBERS": sets.members,
        }
        self.tile = {
            **cut,
            "channels": sets.channels,
            "CHANNELS_LAST": sets.channels_last,
            "OF_ELEMENTS": sets.of_elements,
            "BLOCK_CHANNELS": channels,
            "BLOCK_POSITIONS": positions,
        }
        members = min(power_of_2(sets.members), 1024)
        at_once = min(power_of_2(self.count), 512, 2048 // members)
        groups = min(power_of_2(sets.groups), 2048 // (members * at_once))
        self.merges = sets.outer * divided(sets.groups, groups)
        self.merged = {
            **cut,
            "BLOCK_GROUPS": groups,
            "BLOCK_MEMBERS": members,
            "BLOCK_PIECES": at_once,
        }


def _tile(sets: _Sets) -> tuple[int, int]:
    """The channels and positions that a program reads at a time."""
    if not sets.channels_last:
        positions = min(power_of_2(sets.positions), _TILE)
        return min(power_of_2(sets.channels), _TILE // positions), positions
    channels = min(power_of_2(sets.channels), 128)
    if sets.channels % channels:
        # 320 channels would leave 64 of the third 128 idle.
        channels = min(channels, 64)
    return channels, min(power_of_2(sets.positions), _TILE // channels)


def _pieces_forward(call: _Call) -> Pass:
    sets = call.sets
    cut = _Pieces(sets, call.device)
    channels, positions = _tile(sets)
    # A tile of one channel spills in more threads, of 128 registers each, and not in 128 of 255.
    threads = call.threads(channels * positions) if channels > 1 else cut.threads
    last = call.launch(pieces.apply, cut.programs, cut.threads, ("y",), **cut.tile)
    if call.has_residual:
        # The first launch leaves what is normalized.
        last = last._replace(reads=("sum", *last.reads[1:]))
    launches = (
        call.launch(pieces.moments, cut.programs, threads, ("sum", "parts"), **cut.tile),
        call.launch(pieces.merge_moments, cut.merges, 128, ("statistics",), **cut.merged),
        last,
    )
    return call.with_scratch(launches, {"parts": sets.outer * cut.count * 2 * sets.channels})


def _pieces_backward(call: _Call) -> Pass:
    sets = call.sets
    cut = _Pieces(sets, call.device)
    # Of rows the sums have gamma in them already, and are of no parameter.
    merge = pieces.merge_sums_of_rows if sets.of_elements else pieces.merge_sums
    writes = ("means",) if sets.of_elements else ("sums", "means")
    launches = (
        call.launch(pieces.sums, cut.programs, cut.threads, ("parts",), **cut.tile),
        call.launch(merge, cut.merges, 128, writes, **cut.merged),
    )
    scratch = {
        "parts": sets.outer * cut.count * 2 * sets.channels,
        "means": sets.outer * 2 * sets.groups,
    }
    if not sets.of_elements:
        last = call.launch(pieces.gradient, cut.programs, cut.threads, ("dx",), **cut.tile)
        return call.summed((*launches, last), sets.outer, sets.channels, scratch)
    channels, block = sets.groups * sets.positions, 1024
    blocks = divided(channels, block)
    chunks = _chunks(call, 1, divided(call.device.multiprocessors * _PIECES, blocks))
    rows_of_chunk = divided(sets.outer, chunks)
    chunks = divided(sets.outer, rows_of_chunk)
    last = call.launch(
        rows.gradient,
        blocks * chunks,
        _threads(block),
        ("dx", "sums"),
        outer=sets.outer,
        rows_of_chunk=rows_of_chunk,
        BLOCK=block,
    )
    return call.summed((*launches, last), chunks, channels, scratch)
