"""What was done to the layers of a model, and why not."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from normwise.text import printable


@dataclass(frozen=True)
class Record:
    """What became of one layer.

    Attributes:
        layer: where it is, the names of the layers that hold it and its own, as "encoder/norm".
        was: its class.
        done: what was done, as "GroupNormalization"; "kept" where nothing was.
        why: the reason, or what to know of it.
        changed: whether anything was done.

    Example:

    >>> Record("encoder/norm", "BatchNormalization", "GroupNormalization(groups=8)").changed
    True
    """

    layer: str
    was: str
    done: str
    why: str = ""
    changed: bool = True


@dataclass(frozen=True)
class Report:
    """What was done to a model: a record for each layer that was looked at, and notes on the whole.

    It is a sequence of its records; Rich prints it as a table.

    Example:

    >>> kept = Record("norm", "BatchNormalization", "kept", "its input has rank 2", changed=False)
    >>> report = Report("batch norms replaced", [kept])
    >>> len(report), report[0].done, report.changed
    (1, 'kept', [])
    """

    title: str
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    @property
    def changed(self) -> list[Record]:
        """The records of the layers that were changed."""
        return [record for record in self.records if record.changed]

    def __rich__(self):
        from rich.table import Table
        from rich.text import Text

        lines = [f"{len(self.changed)} of {len(self.records)} norms changed", *self.notes]
        table = Table(
            title=Text(printable(self.title)),
            caption=Text("\n".join(map(printable, lines))),
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("layer", "was", "now", "why"):
            table.add_column(heading, overflow="fold")
        for record in self.records:
            cells = (record.layer, record.was, record.done, record.why)
            # As text, for Rich would read [x] as a style.
            table.add_row(*(Text(printable(cell)) for cell in cells))
        return table
