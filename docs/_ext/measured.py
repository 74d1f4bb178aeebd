"""What the benchmarks measured, from the JSON files in docs/measured, for docs/benchmarks.md.

Each part is written before the pages are read, as docs/generated/NAME.md, and with it its chart.
"""

import json
import os
import sys
from pathlib import Path

from rich.table import Table

DOCS = Path(__file__).resolve().parents[1]
MEASURED, GENERATED = DOCS / "measured", DOCS / "generated"
sys.path.insert(0, str(DOCS.parent / "benchmarks"))

TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
NOT_YET = "Not measured yet.\n"


def setup(app):
    """Write the parts when a build begins."""
    app.connect("builder-inited", lambda app: write())
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write():
    """Write every part; where a file changes nothing, it stays as old as it is."""
    GENERATED.mkdir(exist_ok=True)
    for name, part in {"kernels": kernels, "training": training, "gpu": gpu}.items():
        path, text = GENERATED / f"{name}.md", part()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def reports(name):
    """What was measured under a name, by backend."""
    paths = {backend: MEASURED / f"{name}-{backend}.json" for backend in TITLES}
    return {
        backend: json.loads(path.read_text(encoding="utf-8"))
        for backend, path in paths.items()
        if path.exists()
    }


def kernels():
    """The chart, the means over all norms, and every norm, of `benchmarks/kernels.py`."""
    found = reports("kernels")
    if not found:
        return NOT_YET
    import chart

    chart.draw(list(found.values()), GENERATED / "kernels.svg")
    alternative = "How many times as long Keras's own layers take, on each backend"
    parts = [picture("kernels.svg", alternative), machine(found)]
    parts.append(means(found))
    for backend, report in found.items():
        parts.append(f":::{{dropdown}} Every norm on {TITLES[backend]}\n{cases(report)}\n:::")
    return "\n\n".join(parts) + "\n"


def means(found):
    """The geometric mean over all norms, and the least of them in brackets, for every peer."""
    kinds, rows = {}, {}
    for backend, report in found.items():
        for mean in report["means"]:
            kind = f"{mean['dtype']} {mean['direction'].replace('forward+', 'and ')}"
            kinds[kind] = None
            of_peer = rows.setdefault((TITLES[backend], mean["peer"]), {})
            of_peer[kind] = f"{mean['mean']:.1f} ({mean['worst_ratio']:.1f})"
    cells = [(*peer, *(row.get(kind, "-") for kind in kinds)) for peer, row in rows.items()]
    return table(("backend", "time of", *kinds), cells)


def cases(report):
    """Every norm of a backend: our time, and the others' in times of it."""
    peers = list(dict.fromkeys(peer for row in report["rows"] for peer in row["ratios"]))
    rows = [
        (
            row["case"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            row["direction"],
            row["kernel"],
            f"{row['ms']['normwise']:.3f}",
            *(f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else "-" for peer in peers),
            f"{row['share_of_copy_speed']:.0%}",
        )
        for row in report["rows"]
    ]
    heads = ("norm", "shape", "dtype", "direction", "kernel", "ms")
    return table((*heads, *peers, "share of a copy's speed"), rows)


def training():
    """What a norm adds to a step of training, of `benchmarks/training.py`."""
    found = reports("training")
    if not found:
        return NOT_YET
    rows = [
        (
            TITLES[backend],
            row["norm"],
            f"{report['step_ms_without_norm']:.2f}",
            *(f"{row['added_ms'][whose]:.2f}" for whose in ("Keras", "normwise")),
            f"{row['ours_over_keras']:.2f}",
        )
        for backend, report in found.items()
        for row in report["rows"]
    ]
    heads = ("backend", "norm", "step without, ms", "Keras's adds, ms", "ours adds, ms", "ratio")
    return table(heads, rows) + "\n\n" + machine(found) + "\n"


def gpu():
    """The tables and the chart of `benchmarks/gpu.py`, of all its files together."""
    paths = sorted(MEASURED.glob("gpu-*.json"))
    if not paths:
        return NOT_YET
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import gpu as benchmark
    import gpu_report

    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    parts = Parts()
    gpu_report.show(benchmark.CASES, found, parts)
    gpu_report.draw(benchmark.CASES, found, GENERATED / "gpu.svg")
    shown = picture("gpu.svg", "Others' time over normwise's on a GPU")
    return "\n\n".join((shown, *parts.said)) + "\n"


def picture(name, alternative):
    """A chart that was drawn, which scrolls where it would be too small to read."""
    return f":::{{div}} wide\n![{alternative}](generated/{name})\n:::"


class Parts:
    """What stands in for a console: tables become Markdown's."""

    def __init__(self):
        self.said = []

    def print(self, *things, **_):
        """Take what would be printed."""
        self.said += [rich(thing) if isinstance(thing, Table) else thing for thing in things]


def rich(found):
    """A table of Rich in Markdown, with its title."""
    columns = [list(column.cells) for column in found.columns]
    heads = [str(column.header) for column in found.columns]
    return f"**{found.title}**\n\n" + table(heads, zip(*columns, strict=True))


def table(heads, rows):
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(found):
    """With what it was measured."""
    (known, *others) = (report["versions"] for report in found.values())
    shown = {
        "commit": known["commit"][:12],
        "processor": f"{known['CPU']}, {known['cores']} cores, {known['native kernels']}",
        "Python": known["python"],
        "Keras": known["keras"],
    }
    for versions in (known, *others):
        backend = versions["Keras backend"]
        number = versions.get(backend) or versions.get(f"{backend}-cpu", "")
        shown[TITLES[backend]] = number
    return "Measured with " + "; ".join(f"{name} {value}" for name, value in shown.items()) + "."
