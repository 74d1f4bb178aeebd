"""Where readings go as they are made: a CSV file, a folder of TensorBoard."""

import csv
import dataclasses
import importlib
import io
import itertools
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from normwise.models.readings import FIELDS, Reading


class CsvWriter:
    """Appends a line for each reading to a file, which begins anew with a header."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._append([FIELDS], "w")

    def write(self, readings: Sequence[Reading]) -> None:
        """Append lines of numbers with all their digits; a field that is None stays empty."""
        self._append(map(dataclasses.astuple, readings), "a")

    def _append(self, rows, mode: str) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        # In one piece, and closed: who reads on meanwhile finds whole lines.
        with self._path.open(mode, encoding="utf-8", newline="") as file:
            file.write(text.getvalue())


class TensorBoardWriter:
    """Adds the numbers of each reading as scalars, "norms/<layer>/<number>", to a file of events.

    It writes by the package tensorboard alone, which needs no TensorFlow.
    """

    _count = itertools.count()

    def __init__(self, folder: Path):
        event_pb2, self._summary_pb2, self._record_writer = _parts()
        self._event = event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(self._count)}"
        self._path = folder / f"events.out.tfevents.{name}.normwise"
        self._append(file_version="brain.Event:2")

    @staticmethod
    def check(folder: Path) -> None:
        """Raise ValueError where TensorBoard is not installed."""
        try:
            _parts()
        except ImportError as error:
            raise ValueError(
                f"tensorboard={str(folder)!r} needs the package tensorboard, which cannot be "
                f"imported ({error}); install it by `pip install tensorboard`, or use csv="
            ) from error

    def write(self, readings: Sequence[Reading]) -> None:
        """Add the numbers that are known."""
        values = [
            self._summary_pb2.Summary.Value(
                tag=f"norms/{reading.layer}/{name}", simple_value=number
            )
            for reading in readings
            for name, number in reading.numbers().items()
            if number is not None
        ]
        summary = self._summary_pb2.Summary(value=values)
        self._append(step=readings[0].step, summary=summary)

    def _append(self, **event) -> None:
        with self._path.open("ab") as file:
            records = self._record_writer.RecordWriter(file)
            records.write(self._event(wall_time=time.time(), **event).SerializeToString())
            records.flush()


def _parts() -> list:
    names = "compat.proto.event_pb2", "compat.proto.summary_pb2", "summary.writer.record_writer"
    return [importlib.import_module(f"tensorboard.{name}") for name in names]
