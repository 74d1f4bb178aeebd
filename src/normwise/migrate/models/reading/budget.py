"""How much a file may ask for: in proportion to the bytes that it has, not to those it claims."""

# Of each thing, how many any file may ask for, and how many more for each of its bytes.
LIMITS = {
    # Read: no object of a file takes less of it than 32 bytes; weights that were trained shrink by
    # a tenth where they are compressed, and zeros by a thousand.
    "objects": (64, 1 / 32),
    "bytes of text": (1 << 16, 8),
    "bytes of arrays": (1 << 20, 20),
    # Built: a call takes a millisecond or more, and with its layer hundreds of bytes of a config.
    "layers": (1_000, 1 / 32),
    "calls": (500, 1 / 64),
    "tensors": (1_000, 1 / 8),
    "names of weights": (10_000, 1),
    "bytes of weights": (1 << 20, 20),
    # Tried on random input: a small model may well take a large image or a long series.
    "elements": (1 << 26, 64),
    "operations": (1 << 33, 1 << 12),
    "steps": (1_000, 1 / 32),
}


class Budget:
    """What one file has asked for, and its limits.

    Args:
        file_bytes: the size of the file, or of the files of a folder together.
    """

    def __init__(self, file_bytes: int):
        self._file_bytes = file_bytes
        self._limits = {
            what: least + int(each * file_bytes) for what, (least, each) in LIMITS.items()
        }
        self._spent = dict.fromkeys(LIMITS, 0)

    def spend(self, what: str, amount: int = 1) -> None:
        """Count something before it is made.

        Raises:
            ValueError: the file has asked for more of it than its size allows, or for less than
                none.
        """
        if not amount >= 0:
            raise ValueError(f"it asks for {amount} {what}; expected a count")
        self._spent[what] += amount
        if self._spent[what] > self._limits[what]:
            remedy = "; if it is yours, save it without compression" if "arrays" in what else ""
            raise ValueError(
                f"it asks for more than {self._limits[what]:,} {what}, which is the most for a "
                f"file of {self._file_bytes:,} bytes{remedy}"
            )
