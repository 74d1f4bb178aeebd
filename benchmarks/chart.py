"""Draw what kernels.py measured: how many times as long Keras's own layers take, on each backend.

Matplotlib without pyplot, as in normwise.tutorial.figures, and in its colours, which colour-blind
readers can tell apart.
"""

import pathlib

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

PEER = "Keras"
INK, PALE_INK = "#1a1a1a", "#5f5f5f"
COLOURS = {"forward": "#56b4e9", "forward+backward": "#0072b2"}
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


def draw(reports, path: pathlib.Path):
    """Write one panel a backend, one pair of bars a case: float32, and bfloat16 as a point.

    Args:
        reports: what kernels.py wrote, one a backend.
        path: of the picture; its suffix names the format.
    """
    order = list(TITLES)
    reports = sorted(reports, key=lambda report: order.index(_backend(report)))
    names = list(dict.fromkeys(row["case"] for report in reports for row in report["rows"]))
    ratios = [row["ratios"].get(PEER) for report in reports for row in report["rows"]]
    shown = [ratio for ratio in ratios if ratio is not None]
    limits = min([0.8, *(0.9 * ratio for ratio in shown)]), 1.1 * max([2, *shown])
    figure = Figure(
        figsize=(1.7 + 3.3 * len(reports), 1.5 + 0.43 * len(names)),
        dpi=160,
        facecolor="white",
        layout="constrained",
    )
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axes, report in zip(panels, reports, strict=True):
        _panel(axes, report, names, limits)
    panels[0].set_yticks(range(len(names)), names, fontsize=11, color=INK)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("Keras's time / normwise's (log scale)", fontsize=11, color=INK)
    handles = [
        Patch(color=colour, label=f"float32, {direction}") for direction, colour in COLOURS.items()
    ]
    figure.legend(
        handles=[*handles, Line2D([], [], **POINT, label="bfloat16")],
        loc="outside upper center",
        ncols=len(handles) + 1,
        frameon=False,
        fontsize=11,
    )
    figure.savefig(path)


def _panel(axes, report, names, limits):
    backend = _backend(report)
    rows = {(row["case"], row["direction"], row["dtype"]): row for row in report["rows"]}
    # Across the panel in shares of its width, and along it as the bars lie.
    beside = axes.get_yaxis_transform()
    for number, name in enumerate(names):
        for side, (direction, colour) in zip((-0.5, 0.5), COLOURS.items(), strict=True):
            at = number + side * BAR_HEIGHT
            row = rows.get((name, direction, "float32"))
            ratio = row and row["ratios"].get(PEER)
            if ratio is not None:
                # From 1, so that the bar of a case where Keras is faster points to the left.
                axes.barh(at, ratio - 1, BAR_HEIGHT, left=1, color=colour)
                axes.text(1.12, at, f"{ratio:.1f}", transform=beside, **NUMBER)
            half = rows.get((name, direction, "bfloat16"))
            if half and PEER in half["ratios"]:
                axes.plot(half["ratios"][PEER], at, **POINT)
        note = next((row["notes"].get(PEER) for key, row in rows.items() if key[0] == name), None)
        if note:
            word = note.partition(":")[0]
            axes.text(1, number, f"  {PEER} {word}", va="center", fontsize=10, color=PALE_INK)
    axes.axvline(1, color=INK, linewidth=1.2)
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
    means = {
        mean["direction"]: mean["mean"]
        for mean in report["means"]
        if (mean["peer"], mean["dtype"]) == (PEER, "float32")
    }
    mean = ", ".join(f"{means[direction]:.1f}" for direction in COLOURS if direction in means)
    axes.set_title(
        f"{TITLES[backend]}\ngeometric means {mean}", fontsize=11, color=INK, fontweight="bold"
    )


def _backend(report):
    return report["versions"]["Keras backend"]
