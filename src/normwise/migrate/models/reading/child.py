"""The program of the process that reads a file: it answers with plain data, and imports no Keras.

It is given as JSON where to find modules, which of formats' functions to call with what path, and
its limits. It answers READY, the length of the plain data in 8 bytes, these as JSON, and then the
bytes of the contents, one after the other.
"""

import contextlib
import json
import os
import sys
import types
from pathlib import Path

READY = b"normwise"


def main() -> None:
    """Read a file, and write what it holds to standard output."""
    task = json.loads(sys.argv[1])
    sys.path[:] = task["search"]
    # The package itself would import Keras.
    folder = Path(__file__).parents[3]
    for name in ("normwise", "normwise.migrate", "normwise.migrate.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from normwise.migrate.models.reading import formats

    answer = sys.stdout.buffer
    answer.write(READY)
    answer.flush()
    _limit(task["processor_s"], task["memory_bytes"])
    contents = []
    try:
        plain, contents = getattr(formats, task["function"])(Path(task["path"]))
        plain["sizes"] = [len(each) for each in contents]
        header = json.dumps(plain).encode()
    except Exception as error:
        header = json.dumps({"error": [type(error).__name__, str(error)[:10_000]]}).encode()
    answer.write(len(header).to_bytes(8, "little") + header)
    for each in contents:
        answer.write(each)
    answer.flush()


def _limit(processor_s: int, memory_bytes: int) -> None:
    """Limit what comes from here on, where the system can; and write no file, not even a core."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        spent_s = int(sum(os.times()[:2])) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (spent_s + processor_s, spent_s + processor_s + 1))
        # What is reserved already, of which Linux tells.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
