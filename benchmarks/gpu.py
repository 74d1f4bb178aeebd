"""Time normwise on a GPU against every other way to the same norm, on PyTorch or on JAX.

    KERAS_BACKEND=torch python benchmarks/gpu.py --half 1 --json docs/measured/gpu-torch-1.json
    KERAS_BACKEND=jax python benchmarks/gpu.py --json docs/measured/gpu-jax.json
    python benchmarks/gpu.py --from docs/measured/gpu-*.json --chart build/gpu.png
    TRITON_INTERPRET=1 python benchmarks/gpu.py --dry

The last tries all of it out without a GPU, on tiny inputs; its times mean nothing.

Every peer is first held against float64, y and gradients on all elements, by the very functions
that are timed after. Then those of a case run in random order, again and again, and medians are
compared. A peer that is wrong or raises is "-", and the JSON says why. Two kinds of times:

    graph    of the kernels alone, many calls in one CUDA graph; "kernels" is normwise's on tensors
             that exist. PyTorch only.
    call     of many calls from Python, one after another, until the last has ended: of a small case
             it is what a call costs the host, of a large one what it costs the GPU.

Nothing clears the L2 between calls; most cases are too large for it. The share of a copy's speed is
the time of `x.clone()` over that of the kernels, which forward read x and write y; backward, where
they read x and dy and write dx, it is one and a half times that.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import re
import time
import warnings

# Before Keras is imported, which reads it once.
os.environ.setdefault("KERAS_BACKEND", "torch")

import gpu_report
import keras
import measuring
from gpu_peers import DIRECTIONS, OURS, copies, makers
from peers import Case

import normwise
from normwise.kernels import gpu

START = time.perf_counter()
BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch
elif BACKEND == "jax":
    import jax

CASES = [
    Case("ln bert", "layer", (64, 512, 1024)),
    Case("rms llm", "rms", (4, 4096, 4096)),
    Case("ln convnext last", "layer", (64, 56, 56, 128)),
    Case("ln convnext first", "layer", (64, 128, 56, 56), axis=1),
    Case("gn unet last", "group", (32, 64, 64, 320), groups=32),
    Case("gn unet first", "group", (32, 320, 64, 64), axis=1, groups=32),
    Case("gn batch 1 last", "group", (1, 512, 512, 256), groups=32),
    Case("in style last", "instance", (16, 256, 256, 64)),
    Case("in style first", "instance", (16, 64, 256, 256), axis=1),
    Case("in 3d last", "instance", (1, 128, 128, 128, 32)),
    Case("gn resnet last", "group", (64, 28, 28, 256), groups=32),
    Case("gn tutorial", "group", (32, 26, 26, 10), groups=5),
    Case("ln small", "layer", (8, 128, 768)),
    # No extent but the batch is a multiple of 16, as 16-byte loads want it.
    Case("odd rows", "layer", (128, 333, 1000)),
    Case("odd runs", "group", (32, 300, 65, 65), axis=1, groups=30),
    Case("odd columns", "group", (64, 51, 51, 250), groups=25),
    Case("odd kept", "layer", (128, 1000, 333), axis=1),
]
# Half an ulp of 1; a peer may calculate in the dtype itself, or add up float32 carelessly.
ROUNDING = {"bfloat16": 2.0**-8, "float32": 2.0**-24}
PEER_EPS = {"bfloat16": ROUNDING["bfloat16"], "float32": 16 * ROUNDING["float32"]}
SMALLEST = 2.0**-126
RESULTS = ("y", "dx", "dgamma", "dbeta")


def tiny(case: Case) -> Case:
    """The same with few elements."""
    channels = 2 * case.groups if case.groups else 6
    shape = [min(extent, 3) for extent in case.shape]
    shape[case.axis] = channels
    return dataclasses.replace(case, shape=tuple(shape))


# What is right, in float64


def extents(case: Case):
    """The shape (outer, before, groups, members, after) of x, and which axes a set spans."""
    axis = case.axis % len(case.shape)
    leading, after = case.shape[:axis], math.prod(case.shape[axis + 1 :])
    if case.norm in ("group", "instance"):
        groups = case.groups or case.channels
        shape = (leading[0], math.prod(leading[1:]), groups, case.channels // groups, after)
        return shape, (1, 3, 4)
    return (math.prod(leading), 1, 1, case.channels, after), (3,)


def reference(case: Case, epsilon: float, x, dy, gamma, beta):
    """Return y and its gradients by their formulas, and how far each may be off at a rounding of 1.

    Formulas and tolerances are those of tests/reference.py, whose labels take a second for 2**18
    elements, and which knows no GPU.
    """
    shape, inside = extents(case)
    centred, size = case.norm != "rms", math.prod(shape[axis] for axis in inside)
    x, dy = x.reshape(shape), dy.reshape(shape)
    gamma = gamma.reshape(1, 1, *shape[2:4], 1)
    beta = 0 if beta is None else beta.reshape(gamma.shape)

    def mean(values):
        return values.mean(axis=inside, keepdims=True)

    def gathered(values):
        return values.sum(axis=(0, 1, 4)).reshape(-1)

    average = mean(x) if centred else 0 * mean(x)
    inv_std = (mean((x - average) ** 2) + epsilon) ** -0.5
    normalized = (x - average) * inv_std
    ahead = dy * gamma
    dx = ahead - normalized * mean(ahead * normalized) - (mean(ahead) if centred else 0)
    y, dgamma = normalized * gamma + beta, gathered(dy * normalized)
    right = dict(zip(RESULTS, (y, dx * inv_std, dgamma, gathered(dy)), strict=True))
    condition, far = 1 + abs(average) * inv_std, abs(normalized)
    terms = abs(gamma) * (1 + far)
    ahead = abs(ahead)
    pulled = ahead + mean(ahead) + far * mean(ahead * far)
    weight = 32 * condition * abs(dy)
    y = 16 * (abs(gamma) * condition + terms + abs(beta)) + size**0.5 * terms
    dx = 32 * size**0.5 * condition * inv_std * pulled
    off = (y, dx, gathered(weight * (1 + far)), gathered(weight))
    return right, dict(zip(RESULTS, off, strict=True))


def outside(found, right, off, eps: float, rounding: float):
    """How many elements are not within their tolerance; NaN never is."""
    tolerance = eps * off + 2 * rounding * abs(right) + SMALLEST
    return (~(abs(found.reshape(right.shape) - right) <= tolerance)).sum()


def float64(tensor):
    """The tensor in float64, None if it is None."""
    return None if tensor is None else keras.ops.cast(tensor, "float64")


if BACKEND == "jax":
    # Compiled as one: a compilation for every operation and shape takes many times as long.
    reference = jax.jit(reference, static_argnums=(0, 1))
    outside = jax.jit(outside)


class Problem:
    """A case with its data in one dtype, its layers, and what is right."""

    def __init__(self, case: Case, dtype: str):
        self.case, self.dtype = case, dtype
        self.layers = case.layers(dtype)
        gamma, beta = (keras.random.uniform((case.channels,), 0.5, 1.5, seed=n) for n in (0, 1))
        for layer in self.layers:
            layer.build(case.shape)
            layer.set_weights([gamma, beta][: len(layer.weights)])
        self.ours, self.theirs = self.layers
        self.weights = [variable.value for variable in self.ours.trainable_variables]
        self.x, self.dy = (
            keras.ops.cast(keras.random.normal(case.shape, mean, 2, seed=seed), dtype)
            for seed, mean in ((2, 1), (3, 0))
        )
        with _float64_there():
            given = map(float64, (self.x, self.dy, gamma, beta if len(self.weights) == 2 else None))
            self.right, self.off = reference(case, self.ours.epsilon, *given)

    def check(self, name: str, peer: dict):
        """Raise AssertionError unless the peer is right."""
        eps = ROUNDING["float32"] if name in OURS else PEER_EPS[self.dtype]
        y = peer["forward"]()
        self._compare([y], ["y"], eps)
        y, gradients = peer["forward+backward"]()
        self._compare([y, *gradients], RESULTS, eps)
        if "backward" in peer:
            self._compare(peer["backward"](), RESULTS[1:], eps)

    def _compare(self, tensors, names, eps):
        for tensor, name in zip(tensors, names, strict=False):
            dtype = keras.backend.standardize_dtype(tensor.dtype)
            if name in ("y", "dx") and dtype != self.dtype:
                raise AssertionError(f"{name} has dtype {dtype}, not {self.dtype}")
            with _float64_there():
                right, off = self.right[name], self.off[name]
                wrong = int(outside(float64(tensor), right, off, eps, ROUNDING[self.dtype]))
            if wrong:
                raise AssertionError(f"{name}: {wrong} of {math.prod(tensor.shape)} are off")


def _float64_there():
    return jax.enable_x64(True) if BACKEND == "jax" else contextlib.nullcontext()


# How they are timed


def finish(result=None):
    """Wait for the GPU."""
    if BACKEND == "jax":
        jax.block_until_ready(result)
    elif torch.cuda.is_available():
        torch.cuda.synchronize()


def batch(call, how: str, dry: bool):
    """Some milliseconds of calls as one function, and how many calls these are."""
    finish(call())
    start = time.perf_counter()
    finish(call())
    count = 1 if dry else max(1, min(200, int(2e-3 / (time.perf_counter() - start))))

    def run():
        for _ in range(count):
            result = call()
        return result

    if how == "graph" and not dry:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
        return lambda: finish(graph.replay()), count
    return lambda: finish(run()), count


def measure(problem: Problem, compiled: bool, seconds: float, dry: bool):
    """The times in us of every peer that is right, and the notes on those that are not."""
    right, times, notes = {}, [], {}
    for name, make in makers(problem, compiled).items():
        try:
            peer = make()
            problem.check(name, peer)
            right[name] = peer
        except Exception as error:
            notes[name] = _words(error)
    extra = {} if compiled else copies(problem)
    for how in ("graph", "call") if BACKEND == "torch" else ("call",):
        for direction in DIRECTIONS[BACKEND]:
            calls = {name: peer[direction] for name, peer in right.items() if direction in peer}
            calls |= extra if how == "call" else {n: c for n, c in extra.items() if n == "copy"}
            batches = {}
            for name, call in calls.items():
                try:
                    batches[name] = batch(call, how, dry)
                except Exception as error:
                    notes[f"{name}, {how}, {direction}"] = _words(error)
            runs = {name: run for name, (run, _) in batches.items()}
            for name, elapsed_ms in measuring.medians_ms(runs, seconds).items():
                elapsed_us = elapsed_ms * 1e3 / batches[name][1]
                times.append({"direction": direction, "how": how, "peer": name, "us": elapsed_us})
    return times, notes


_BOLD = r"\x1b\[\d+m"


def _words(error):
    wrong = "is wrong" if isinstance(error, AssertionError) else f"raises {type(error).__name__}"
    # Keras prints its messages in bold and over many lines.
    return f"{wrong}: {' '.join(re.sub(_BOLD, '', str(error)).split())[:200]}"


def run(arguments, console) -> dict:
    """Check and time the cases until the time is up, and return everything."""
    cases = CASES[arguments.half - 1 :: 2] if arguments.half else CASES
    if arguments.cases:
        cases = [case for case in CASES if case.name in arguments.cases]
    report = {"versions": versions(), "times": [], "notes": [], "left_out": []}
    # torch.compile's last: it takes longest, and is the first to be left out.
    parts = (False, True) if BACKEND == "torch" else (False,)
    for compiled in parts:
        # A guess, until one was timed.
        longest_s = 10 if compiled else 0
        for dtype in arguments.dtypes:
            for case in cases:
                key = {"backend": BACKEND, "case": case.name, "dtype": dtype}
                start = time.perf_counter()
                if start + longest_s > START + arguments.budget:
                    which = ", torch.compile" if compiled else ""
                    report["left_out"].append(f"{case.name}, {dtype}{which}")
                    continue
                problem = Problem(tiny(case) if arguments.dry else case, dtype)
                chosen = normwise.explain(problem.ours, problem.case.shape, dtype)
                times, notes = measure(problem, compiled, arguments.seconds, arguments.dry)
                report["times"] += [key | each for each in times]
                if chosen.kernel != gpu.NAME:
                    notes["auto"] = f"takes {chosen.kernel}, since {chosen.reason}"
                report["notes"] += [key | {"peer": n, "note": note} for n, note in notes.items()]
                del problem
                if BACKEND == "torch":
                    torch.compiler.reset()
                    torch.cuda.empty_cache()
                measuring.write(report, arguments.json)
                elapsed_s = time.perf_counter() - start
                longest_s = max(longest_s, elapsed_s)
                console.print(f"{case.name}, {dtype}: {elapsed_s:.1f} s", highlight=False)
    measuring.write(report, arguments.json)
    return report


def versions() -> dict:
    """What the numbers depend on."""
    found = measuring.versions()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if BACKEND == "jax":
        found["GPU"] = jax.devices()[0].device_kind
    elif torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def why_not(dry: bool) -> str | None:
    """Why nothing can be timed here, or None."""
    if BACKEND not in ("torch", "jax"):
        return f"KERAS_BACKEND={BACKEND} has no kernels for a GPU; set it to torch or jax"
    if dry:
        if BACKEND == "torch" and not gpu.interpreted():
            return "--dry runs the kernels in Triton's interpreter; set TRITON_INTERPRET=1"
        return None
    if BACKEND == "torch" and gpu.interpreted():
        return "TRITON_INTERPRET=1 runs no kernels on a GPU; unset it, or try things out with --dry"
    there = torch.cuda.is_available() if BACKEND == "torch" else jax.default_backend() == "gpu"
    if there:
        return None
    return (
        f"{BACKEND} sees no GPU, and these times are of one; run this on a machine with an NVIDIA "
        "GPU, or with TRITON_INTERPRET=1 and --dry to try it out"
    )


def main():
    """Measure, or read what was measured; then write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here as they come")
    parser.add_argument("--chart", type=pathlib.Path, help="draw shares and ratios here")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        type=pathlib.Path,
        help="measure nothing and read these JSON files, of one backend or of both",
    )
    listed = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--cases", **listed, help=f"some of: {', '.join(names)}")
    parser.add_argument("--half", type=int, choices=[1, 2], help="every other case")
    parser.add_argument("--dtypes", **listed, default=list(ROUNDING), help="bfloat16,float32")
    parser.add_argument("--budget", type=float, default=135.0, help="seconds after the imports")
    parser.add_argument("--seconds", type=float, default=0.25, help="of a direction of a case")
    parser.add_argument("--dry", action="store_true", help="tiny inputs, and no GPU")
    arguments = parser.parse_args()
    for given, known in ((arguments.cases, names), (arguments.dtypes, list(ROUNDING))):
        for name in {*(given or ())} - {*known}:
            parser.error(f"{name!r} is none of {', '.join(known)}; name those, with commas between")

    # Of Inductor's and Keras's own doings, at every compilation anew.
    warnings.simplefilter("ignore")
    console = measuring.console(200)
    if arguments.sources:
        reports = [json.loads(source.read_text()) for source in arguments.sources]
    else:
        if (reason := why_not(arguments.dry)) is not None:
            raise SystemExit(reason)
        if arguments.dry:
            arguments.seconds = 0
        with keras.device("cpu") if arguments.dry else _own_stream():
            reports = [run(arguments, console)]
    gpu_report.show(CASES, reports, console)
    if arguments.chart:
        gpu_report.draw(CASES, reports, arguments.chart)
    wrong = [each for report in reports for each in report["notes"] if each["peer"] in OURS]
    if wrong:
        raise SystemExit(f"normwise itself is wrong, or raises, {len(wrong)} times; see above")


def _own_stream():
    """Any but the default stream, for on that one no CUDA graph can be captured."""
    if BACKEND == "torch":
        return torch.cuda.stream(torch.cuda.Stream())
    return contextlib.nullcontext()


if __name__ == "__main__":
    main()
