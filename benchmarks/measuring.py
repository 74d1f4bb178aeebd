"""What the benchmarks share: times that can be compared, and the machine that they hold for."""

import contextlib
import json
import logging
import os
import pathlib
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from rich.console import Console

from normwise import doctor

ROOT = pathlib.Path(__file__).resolve().parents[1]
_FEWEST_ROUNDS = 5

# TensorFlow warns of functions that are made anew, as those of every case are.
logging.getLogger("tensorflow").setLevel(logging.ERROR)


def medians_ms(functions: Mapping[str, Callable], seconds: float) -> dict[str, float]:
    """The median time of each function in ms, all run in random order within a time budget.

    What else the machine does, and what one call leaves in caches and thread pools for the next,
    falls on all alike. Every function is first called twice, to compile and to warm up.
    """
    elapsed_ms = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    order = list(functions)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _FEWEST_ROUNDS or time.perf_counter() < end:
        rounds += 1
        random.shuffle(order)
        for name in order:
            function = functions[name]
            start = time.perf_counter()
            function()
            elapsed_ms[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in elapsed_ms.items()}


@contextlib.contextmanager
def busy(processes: int):
    """Run as many other processes that always want a core, as the workers of a data loader may."""
    spinning = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(spinning) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def console(columns: int) -> Console:
    """A console of at least so many columns: a pipe has none, and a table needs them."""
    made = Console()
    made.width = max(made.width, columns)
    return made


def write(report: dict, path: pathlib.Path | None):
    """Write a report, if a file is named, in one step: who ends the program leaves a whole one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
        unfinished.replace(path)


def versions() -> dict:
    """What the numbers depend on: versions, backend and kernels, the commit and the CPU."""
    return {**doctor.report(), "commit": _commit(), "CPU": _cpu_model(), "cores": cores()}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _commit() -> str:
    """The commit's hash, with `-dirty` where files differ from it; empty outside of a checkout."""
    if shutil.which("git") is None:
        return ""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(
        describe, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


def _cpu_model() -> str:
    known = pathlib.Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())
