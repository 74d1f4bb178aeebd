"""What gpu.py measured, as tables, as a summary beside what is aimed at, and as a chart."""

import collections
import dataclasses
import math
import pathlib
import statistics

from rich.table import Table

# Ours that the others are compared with, if nothing else is said.
OURS = {"graph": "kernels", "call": "normwise"}
HOWS = {"graph": "kernels, in CUDA graphs", "call": "calls, as a user makes them"}
# Passes over memory as long as x, of which a copy takes two.
PASSES = {"forward": 2, "backward": 3}
# Shares of a copy's speed are of cases that no L2 holds. What they are to be: forward, backward.
LARGE = 2**24
SHARES = {"rows": (0.93, 0.75), "kept": (0.85, 0.65), "runs": (0.66, 0.58), "columns": (0.6, 0.55)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A peer's time over ours.

    Args:
        what: the peer, in words.
        backend, how, direction, peer, ours: which times these are.
        mean, least: what the geometric mean and the least of the cases are to be.
    """

    what: str
    backend: str
    how: str
    direction: str
    peer: str
    mean: float | None = None
    least: float | None = None
    ours: str | None = None


COMPARISONS = [
    Comparison("torch's own kernels", "torch", "graph", "forward", "torch", 5, 1),
    Comparison("torch's own kernels", "torch", "graph", "backward", "torch", 4, 1),
    Comparison("torch's own calls", "torch", "call", "forward", "torch"),
    Comparison("torch's own calls", "torch", "call", "forward+backward", "torch"),
    Comparison("Keras on PyTorch", "torch", "call", "forward", "Keras", ours="layer"),
    Comparison("Keras on PyTorch", "torch", "call", "forward+backward", "Keras", ours="layer"),
    Comparison("torch.compile", "torch", "graph", "forward", "compiled torch", least=0.95),
    Comparison("torch.compile", "torch", "graph", "forward+backward", "compiled torch"),
    *(
        Comparison(
            "torch.compile, of both",
            "torch",
            "graph",
            d,
            "compiled torch",
            ours="compiled normwise",
        )
        for d in ("forward", "forward+backward")
    ),
    Comparison("XLA, of normwise", "jax", "call", "forward", "composite", 1.6, 0.95),
    Comparison("XLA, of normwise", "jax", "call", "forward+backward", "composite", 1.3, 0.95),
    Comparison("XLA, of Keras", "jax", "call", "forward", "Keras", 1.6, 0.95),
    Comparison("XLA, of Keras", "jax", "call", "forward+backward", "Keras", 1.3, 0.95),
]


class Times:
    """Every time in us, of all reports together."""

    def __init__(self, cases, reports):
        self.cases = cases
        every = [each for report in reports for each in report["times"]]
        names = ("backend", "case", "dtype", "how", "direction", "peer")
        self.us = {tuple(each[name] for name in names): each["us"] for each in every}
        # In the order in which they were measured.
        self.backends, self.dtypes = (
            list(dict.fromkeys(each[name] for each in every)) for name in ("backend", "dtype")
        )

    def ratios(self, comparison: Comparison, dtype: str) -> dict[str, float]:
        """The peer's time over ours, by case."""
        c = comparison
        ours = c.ours or OURS[c.how]
        pairs = {
            case.name: [
                self.us.get((c.backend, case.name, dtype, c.how, c.direction, peer))
                for peer in (c.peer, ours)
            ]
            for case in self.cases
        }
        return {name: theirs / own for name, (theirs, own) in pairs.items() if theirs and own}

    def shares(self, of: str, direction: str, dtype: str) -> dict[str, float]:
        """The share of a copy's speed, of the large cases of a pattern."""
        passes = PASSES[direction] / PASSES["forward"]
        copied = Comparison("", "torch", "graph", direction, "copy")
        found = {name: passes * ratio for name, ratio in self.ratios(copied, dtype).items()}
        return {
            case.name: found[case.name]
            for case in self.cases
            if case.name in found and case.geometry.pattern == of and math.prod(case.shape) > LARGE
        }


def show(cases, reports, console):
    """Print the tables, what is to be said of them, and the summary."""
    times = Times(cases, reports)
    for backend in times.backends:
        for how in HOWS:
            if any(key[0] == backend and key[3] == how for key in times.us):
                console.print(_table(times, backend, how))
    noted = collections.defaultdict(list)
    for each in (each for report in reports for each in report["notes"]):
        what = f"{each['backend']}, {each['dtype']}: {each['peer']} {each['note']}"
        noted[what].append(each["case"])
    for what, names in noted.items():
        console.print(f"{what} ({', '.join(names)})", markup=False, highlight=False)
    for report in reports:
        if report["left_out"]:
            words = f"left out for want of time: {'; '.join(report['left_out'])}"
            console.print(words, markup=False, highlight=False)
    small = [key for key in times.us if key[1] == "ln small" and key[3:5] == ("call", "forward")]
    for backend, dtype in dict.fromkeys((key[0], key[2]) for key in small):
        found = (
            f"{key[5]} {times.us[key]:.1f}" for key in small if (key[0], key[2]) == (backend, dtype)
        )
        console.print(f"us of a small call, {backend}, {dtype}: {', '.join(found)}")
    console.print(_summary(times))


def _table(times: Times, backend: str, how: str) -> Table:
    """Every case, a peer's time with its ratio in brackets."""
    of_table = {key: us for key, us in times.us.items() if (key[0], key[3]) == (backend, how)}
    ours = OURS[how]
    peers = dict.fromkeys(key[5] for key in of_table)
    peers = [ours, *(peer for peer in peers if peer != ours)]
    table = Table(title=f"{backend}: us of {HOWS[how]} (of a peer / {ours})", title_justify="left")
    for column in ("case", "dtype", "direction"):
        table.add_column(column, no_wrap=True)
    for column in (*peers, "share of copy"):
        table.add_column(column, justify="right")
    for _, case, dtype, _, direction in dict.fromkeys(key[:5] for key in of_table):
        us = [of_table.get((backend, case, dtype, how, direction, peer)) for peer in peers]
        cells = ["-" if each is None else f"{each:.1f}" for each in us]
        copied = us[peers.index("copy")] if "copy" in peers else None
        share = "-"
        if us[0]:
            cells[1:] = [
                cell if each is None else f"{cell} ({each / us[0]:.2f})"
                for cell, each in zip(cells[1:], us[1:], strict=True)
            ]
            # Forward and backward are those of either.
            passes = PASSES.get(direction, sum(PASSES.values()))
            share = f"{passes / 2 * copied / us[0]:.0%}" if copied else "-"
        table.add_row(case, dtype, direction, *cells, share)
    return table


def _summary(times: Times) -> Table:
    """Means and worst cases, beside what they are to be."""
    table = Table(title="others' time / normwise's, and shares of a copy", title_justify="left")
    for column in ("what", "dtype", "direction"):
        table.add_column(column)
    for column in ("mean", "target", "least", "target", "cases"):
        table.add_column(column, justify="right")
    table.add_column("least at")
    for dtype in times.dtypes:
        for c in COMPARISONS:
            kind = c.what, dtype, c.direction
            _add(table, kind, times.ratios(c, dtype), c.mean, c.least, "{:.2f}")
        for of, targets in SHARES.items():
            for direction, target in zip(PASSES, targets, strict=True):
                kind = f"share of a copy, {of}", dtype, direction
                _add(table, kind, times.shares(of, direction, dtype), target, None, "{:.0%}")
    return table


def _add(table, kind, found, mean, least, form):
    if found:
        worst = min(found, key=found.get)
        mean_found = statistics.geometric_mean(found.values())
        numbers = (
            "" if each is None else form.format(each)
            for each in (mean_found, mean, found[worst], least)
        )
        table.add_row(*kind, *numbers, str(len(found)), worst)


def draw(cases, reports, path: pathlib.Path):
    """Draw normwise's share of a copy's speed, and the others' time over its own."""
    import chart

    times = Times(cases, reports)
    measured = {key[1] for key in times.us}
    names = {case.name: _words(case) for case in cases if case.name in measured}
    panels = [_shares_panel(chart, times)] if "torch" in times.backends else []
    titles = {
        "torch": ("PyTorch's own kernels", ("forward", "backward")),
        "compiled torch": ("torch.compile of them", ("forward", "forward+backward")),
        "composite": ("XLA, of normwise on JAX", ("forward", "forward+backward")),
    }
    for peer, (title, directions) in titles.items():
        compared = [c for c in COMPARISONS if c.peer == peer and c.ours is None and c.how != "call"]
        compared = compared or [c for c in COMPARISONS if c.peer == peer]
        found = {
            (name, c.direction, dtype): ratio
            for c in compared
            if c.direction in directions
            for dtype in times.dtypes
            for name, ratio in times.ratios(c, dtype).items()
        }
        if found:
            title = f"{title}\n{_means(found, directions, '{:.1f}')}"
            panels.append(chart.Panel(title, "its time / normwise's (log)", found, directions))
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.draw_panels(panels, names, path, bars="bfloat16", points="float32")


def _shares_panel(chart, times):
    directions = tuple(PASSES)
    found = {
        (name, direction, dtype): share
        for of in SHARES
        for direction in directions
        for dtype in times.dtypes
        for name, share in times.shares(of, direction, dtype).items()
    }
    title = f"normwise's kernels\n{_means(found, directions, '{:.0%}')}"
    large = {name for name, *_ in found}
    notes = {case.name: "fits the L2" for case in times.cases if case.name not in large}
    return chart.Panel(title, "share of a copy's speed", found, directions, notes, shares=True)


def _means(found, directions, form):
    """The geometric means of the bars, in words."""
    names = {"forward+backward": "with backward"}
    means = (
        f"{names.get(d, d)} {form.format(statistics.geometric_mean(of_direction))}"
        for d in directions
        if (of_direction := [v for k, v in found.items() if k[1:] == (d, "bfloat16")])
    )
    return ", ".join(means)


def _words(case) -> str:
    """A case in words for who has not read its name's definition."""
    norm = case.norm.upper() if case.norm == "rms" else case.norm
    axis = "" if case.axis == -1 else f", axis {case.axis}"
    return f"{norm} {'×'.join(map(str, case.shape))}{axis}"
