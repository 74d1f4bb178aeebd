"""Text from files of others, for a terminal."""

MAX_LINE = 2_000


def printable(text: str) -> str:
    r"""A text whose control characters, which a terminal would obey, are written out.

    >>> print(printable("layer\x1b[2J"))
    layer\x1b[2J
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def one_line(text: str) -> str:
    """A message as one printable line; of a very long one the beginning and the end."""
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return printable(" ".join(text.split()))
