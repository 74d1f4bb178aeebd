"""Model files with something wrong: the same ones for the same seed.

`mutate` changes any whole file; GREEDY makes files that ask for more than they have.
"""

import random
import shutil
from pathlib import Path

from mutations import (
    archives,
    greedy_files,
    greedy_hdf5,
    greedy_layers,
    greedy_models,
    hdf5,
    raw,
    saved_models,
)

GREEDY = (
    *(*greedy_models.KINDS, *greedy_layers.KINDS),
    *(*greedy_hdf5.KINDS, *greedy_files.KINDS),
)


def mutate(path: Path, folder: Path, rng: random.Random) -> tuple[Path, str]:
    """Write a mutation of a model's file or folder into `folder`; give its path and its kind."""
    target = folder / path.name
    if path.is_dir():
        shutil.copytree(path, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        for each in target.rglob("*"):
            each.chmod(0o755 if each.is_dir() else 0o644)
        kind = saved_models.mutate(target, rng)
    else:
        shutil.copyfile(path, target)
        by_format = archives.mutate if path.suffix == ".keras" else hdf5.mutate
        kind = rng.choices([raw.mutate, by_format], [1, 2])[0](target, rng)
    return target, kind
