"""The engine of GPUs: kernels in Triton, which know no framework.

    launch.py    a pass as launches of kernels, and how a kernel is compiled
    plan.py      which launches calculate a norm, in blocks of which shape
    rows.py      a set is a row of neighbours, each with a gamma of its own
    kept.py      each position after the channels has a set of its own
    runs.py      channels before positions: a set is a run, and a channel a part of it
    whole.py     runs, and columns (positions before channels), that fit registers
    pieces.py    sets that are cut in pieces, of all patterns

Kernels are told `programs_of_sample`, how many programs a sample has where gamma and beta are its
own, and then `outer` is that of a sample; else None, and that of all. RESIDUAL and SUM, or DSUM,
are None where x is normalized alone.

This module brings no Triton: it is imported where a GPU is used.
"""

import importlib.metadata
import importlib.util
import os

from normwise.kernels.kernel import why_not_operands
from normwise.norm import Norm

NAME = "triton"
_DTYPES = ("float32", "float16", "bfloat16")
_OLDEST = (3, 6)


def why_not(norm: Norm) -> str | None:
    """Why the kernels cannot calculate this norm on any GPU, or None."""
    if (reason := why_not_operands(norm, "Triton")) is not None:
        return reason
    if norm.geometry.permutation is not None:
        return "the sets are not neighbouring axes"
    if norm.dtype not in _DTYPES:
        return f"{norm.dtype} has no Triton kernel"
    if 0 in norm.geometry.shape:
        return "x is empty, and no kernel has anything to do"
    return missing()


def _find() -> str | None:
    remedy = "install it with pip install 'normwise[gpu]'"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; {remedy}"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # of a name of its own, as ROCm's
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return f"Triton {version} is older than {oldest}; {remedy}"
    return None


# Sought once, at import, as Triton itself reads its variable: torch.compile traces through a
# functools.cache, and knows neither file systems nor environments.
_MISSING = _find()
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def missing() -> str | None:
    """What keeps this machine from having Triton, or None."""
    return _MISSING


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return _INTERPRETED
