"""A process of its own for files that may be hostile: what a load costs, raises and leaves behind.

The parent asks for one load at a time and outlives whatever the file does to the other process.
"""

import contextlib
import dataclasses
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# A load that hangs is given up after this long. Its time is judged by the processor time that it
# took, since other programs may run beside the tests.
GIVE_UP_S = 60.0
# What a load may reserve, most of which it never touches: XLA's threads alone take a gigabyte. The
# memory that it has touched is measured, and judged by the tests.
RESERVED_LIMIT = 4 << 30
# What was compiled for earlier files stays in memory, and would count for later ones.
LOADS_PER_PROCESS = 400

# What memory the processes took, again and again, that were started for the load that is measured.
_started = []


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one load ended.

    `error` is "ValueError" or "OSError" for the exceptions that are one, and the name of any other;
    it is empty where the file was loaded. `died` says how the process ended, if it did.
    """

    error: str = ""
    text: str = ""
    traceback: str = ""
    processor_s: float = 0.0
    memory_mib: float = 0.0
    written: tuple[str, ...] = ()
    died: str = ""


class Sandbox:
    """Tries files in another process, whose current and temporary folders are in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.current = folder / "deep" / "current"
        self.temporary = folder / "deep" / "temporary"
        # Where `convert` writes.
        self.out = folder / "out" / "out.keras"
        for made in (self.current, self.temporary, self.out.parent):
            made.mkdir(parents=True)
        self._process = None
        self._loads = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def load(self, path: Path, model: Path | None = None) -> Outcome:
        """Load a model, or weights into a model that is loaded from `model`."""
        return self._try([str(path), model and str(model), None])

    def convert(self, path: Path) -> Outcome:
        """Convert a model; what it writes is removed again."""
        return self._try([str(path), None, str(self.out)])

    def _try(self, request) -> Outcome:
        if self._process is None or self._loads == LOADS_PER_PROCESS:
            self._stop()
            self._start()
        self._loads += 1
        # Keras saves by way of the folder for temporary files.
        passing = (self.temporary, self.out.parent) if request[-1] else ()
        before = self._files(passing)
        answer = self._ask(request)
        if "died" in answer:
            self._stop()
        elif request[-1] and not answer.get("error"):
            self.out.unlink()
        return Outcome(**answer, written=tuple(sorted(self._files(passing) ^ before)))

    def _files(self, passing) -> set[str]:
        """All files and folders, and when they changed.

        So a file that came and went shows too, but for those right in the folders in `passing`.
        """
        found = set()
        for path in (self.folder, *self.folder.rglob("*")):
            status = path.lstat()
            changed = 0 if path in passing else status.st_mtime_ns
            found.add(f"{path} {status.st_size} {changed}")
        return found

    def _start(self):
        self._loads = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=self.current,
            env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        ready = self._answer(GIVE_UP_S)
        assert "died" not in ready, ready

    def _stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, request):
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer(GIVE_UP_S)

    def _answer(self, seconds):
        pipe, line = self._process.stdout, b""
        give_up = time.monotonic() + seconds
        while not line.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, give_up - time.monotonic()))[0]:
                return {"died": f"no answer after {seconds:.0f} s"}
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                return {"died": f"exit status {self._process.wait()}"}
            line += part
        return json.loads(line)


def serve():
    """Answer requests until there is none: the other process."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print is no answer.
    os.dup2(2, 1)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    from normwise import migrate

    # Python tries once whether it can write there, and Keras imports TensorFlow when it first
    # saves: no file is to answer for that.
    with tempfile.TemporaryDirectory() as folder:
        keras.Sequential([keras.Input((1,))]).save(f"{folder}/first.keras")
    models = {}
    threading.Thread(target=_watch_children, daemon=True).start()

    def load(path, model, out):
        if out is not None:
            return migrate.convert(path, out)
        if model is None:
            return migrate.load_model(path)
        if model not in models:
            models[model] = migrate.load_model(model)
        return migrate.load_weights(models[model], path)

    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_measured(load, *json.loads(line))), file=answers, flush=True)


def _measured(load, *request):
    # What goes past this limit ends in MemoryError, or in the end of the process.
    limit = _status("VmSize") + RESERVED_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status("VmRSS")
    _started.clear()
    began = _processor_s()
    outcome = {}
    try:
        load(*request)
    except BaseException as error:
        kind = next((c for c in (ValueError, OSError) if isinstance(error, c)), type(error))
        lines = traceback.format_exception(error)
        outcome = {"error": kind.__name__, "text": str(error), "traceback": "".join(lines)}
    outcome["processor_s"] = _processor_s() - began
    started = max(_started, default=0)
    outcome["memory_mib"] = (_status("VmHWM") - resident + started) / 2**20
    return outcome


def _watch_children():
    """Remember what memory each process that is started here takes, until the end.

    What the system tells at a process's end is no less than this process takes, which it began as.
    """
    own, me = Path("/proc/self/cmdline").read_bytes(), os.getpid()
    while True:
        for child in Path(f"/proc/{me}/task/{me}/children").read_text().split():
            with contextlib.suppress(OSError, KeyError):
                if Path(f"/proc/{child}/cmdline").read_bytes() not in (b"", own):
                    _started.append(_status("VmHWM", child))
        time.sleep(0.01)


def _processor_s():
    """The processor time of this process, and of those that it started."""
    return sum(os.times()[:4])


def _status(field, process="self"):
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve()
