"""Time `import normwise` beyond that of Keras and its backend, in fresh interpreters.

    KERAS_BACKEND=jax python benchmarks/importing.py [--rounds N] [--json FILE]

An interpreter imports Keras, which imports the backend, then normwise, and says how long the latter
took. Bytecode is written before the first round, as pip does when it installs. The median of the
rounds is printed, beside the time of Keras's own import, and which modules came with normwise that
are neither its own nor Keras's.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

import measuring

PROGRAM = """
import json, sys, time
start = time.perf_counter()
import keras
keras.ops.convert_to_tensor(0.0)  # a backend is not all there before its first tensor
middle, before = time.perf_counter(), set(sys.modules)
import normwise
end = time.perf_counter()
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"keras", "normwise"}
ms = {"keras_ms": 1e3 * (middle - start), "ms": 1e3 * (end - middle)}
print(json.dumps({**ms, "new": sorted(new)}))
"""


def measure(rounds):
    """The medians in ms over so many interpreters, and the modules that came."""
    ran = []
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(rounds + 1):
        shown = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        ran.append(json.loads(shown.stdout.splitlines()[-1]))
    # The first one writes bytecode and fills the cache of files.
    del ran[0]
    medians = {name: statistics.median(each[name] for each in ran) for name in ("keras_ms", "ms")}
    return {"versions": measuring.versions(), **medians, "new": ran[-1]["new"]}


def main():
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here")
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    backend = found["versions"]["Keras backend"]
    print(f"{backend}: Keras {found['keras_ms']:.0f} ms, then normwise {found['ms']:.1f} ms")
    print(f"modules that came with it: {', '.join(found['new']) or 'none'}")
    measuring.write(found, arguments.json)


if __name__ == "__main__":
    main()
