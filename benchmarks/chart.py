"""Draw what the benchmarks measured: how many times as long others take, a panel for each of them.

Matplotlib without pyplot, as in normwise.tutorial.figures, and in its colours, which colour-blind
readers can tell apart.
"""

import dataclasses
import pathlib

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

PEER = "Keras"
INK, PALE_INK = "#1a1a1a", "#5f5f5f"
COLOURS = ("#56b4e9", "#0072b2")
POINT = {
    "marker": "d",
    "markersize": 5,
    "linestyle": "none",
    "color": "#d55e00",
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
}
NUMBER = {"ha": "right", "va": "center", "fontsize": 9, "color": INK}
TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
BAR_HEIGHT = 0.38


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one panel shows: a pair of bars for each case.

    Args:
        title: of two lines.
        label: of the axis.
        values: by case, direction and dtype.
        directions: the two whose bars they are.
        notes: by case, what is said where there is no bar.
        shares: whether the values are shares of 1, and no ratios.
    """

    title: str
    label: str
    values: dict
    directions: tuple[str, str] = ("forward", "forward+backward")
    notes: dict = dataclasses.field(default_factory=dict)
    shares: bool = False


def draw(reports, path: pathlib.Path):
    """Write one panel a backend of what kernels.py wrote, float32 in bars and bfloat16 as points.

    Args:
        reports: what kernels.py wrote, one a backend.
        path: of the picture; its suffix names the format.
    """
    order = list(TITLES)
    reports = sorted(reports, key=lambda report: order.index(_backend(report)))
    names = list(dict.fromkeys(row["case"] for report in reports for row in report["rows"]))
    labels = dict.fromkeys(names)
    draw_panels([_panel(report) for report in reports], labels, path, "float32", "bfloat16")


def _backend(report):
    return report["versions"]["Keras backend"]


def _panel(report) -> Panel:
    rows = report["rows"]
    means = {
        mean["direction"]: mean["mean"]
        for mean in report["means"]
        if (mean["peer"], mean["dtype"]) == (PEER, "float32")
    }
    mean = ", ".join(f"{means[each]:.1f}" for each in Panel.directions if each in means)
    return Panel(
        f"{TITLES[_backend(report)]}\ngeometric means {mean}",
        f"{PEER}'s time / normwise's (log scale)",
        {
            (row["case"], row["direction"], row["dtype"]): row["ratios"][PEER]
            for row in rows
            if PEER in row["ratios"]
        },
        notes={
            row["case"]: f"{PEER} {row['notes'][PEER].partition(':')[0]}"
            for row in rows
            if PEER in row["notes"]
        },
    )


def draw_panels(panels, names, path: pathlib.Path, bars: str, points: str):
    """Write panels side by side.

    Args:
        panels: of the class above.
        names: of the cases, from the top, each with what is written there or None for itself.
        path: of the picture; its suffix names the format.
        bars, points: the dtypes that are drawn so.
    """
    ratios = [v for panel in panels if not panel.shares for v in panel.values.values()]
    limits = min([0.8, *(0.9 * ratio for ratio in ratios)]), 1.1 * max([2, *ratios])
    figure = Figure(
        figsize=(1.7 + 3.3 * len(panels), 1.5 + 0.43 * len(names)),
        dpi=160,
        facecolor="white",
        layout="constrained",
    )
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, names, limits, bars, points)
    labels = [label or name for name, label in names.items()]
    all_axes[0].set_yticks(range(len(names)), labels, fontsize=11, color=INK)
    all_axes[0].set_ylim(len(names) - 0.4, -0.6)
    labels = [panel.label for panel in panels]
    if len({*labels}) == 1:
        figure.supxlabel(labels[0], fontsize=11, color=INK)
    else:
        for axes, label in zip(all_axes, labels, strict=True):
            axes.set_xlabel(label, fontsize=11, color=INK)
    pairs = (dict.fromkeys(pair) for pair in zip(*(p.directions for p in panels), strict=True))
    handles = [
        Patch(color=colour, label=f"{bars}, {' or '.join(pair)}")
        for colour, pair in zip(COLOURS, pairs, strict=True)
    ]
    figure.legend(
        handles=[*handles, Line2D([], [], **POINT, label=points)],
        loc="outside upper center",
        ncols=len(handles) + 1,
        frameon=False,
        fontsize=11,
    )
    figure.savefig(path)


def _draw_panel(axes, panel, names, limits, bars, points):
    start = 0 if panel.shares else 1
    # Across the panel in shares of its width, and along it as the bars lie.
    beside = axes.get_yaxis_transform()
    for number, name in enumerate(names):
        for side, direction, colour in zip((-0.5, 0.5), panel.directions, COLOURS, strict=True):
            at = number + side * BAR_HEIGHT
            value = panel.values.get((name, direction, bars))
            if value is not None:
                # From 1, so that the bar of a case where others are faster points to the left.
                axes.barh(at, value - start, BAR_HEIGHT, left=start, color=colour)
                text = f"{value:.0%}" if panel.shares else f"{value:.1f}"
                axes.text(1.12, at, text, transform=beside, **NUMBER)
            other = panel.values.get((name, direction, points))
            if other is not None:
                axes.plot(other, at, **POINT)
        if name in panel.notes:
            note = f"  {panel.notes[name]}"
            axes.text(start, number, note, va="center", fontsize=10, color=PALE_INK)
    axes.axvline(start, color=INK, linewidth=1.2)
    if panel.shares:
        axes.set_xlim(0, max([1, *panel.values.values()]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    else:
        axes.set_xscale("log")
        axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9.5, colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE_INK)
    axes.set_title(panel.title, fontsize=11, color=INK, fontweight="bold")
