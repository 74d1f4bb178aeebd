"""Text from files of others, for a terminal."""


def printable(text: str) -> str:
    r"""A text whose control characters, which a terminal would obey, are written out.

    >>> print(printable("layer\x1b[2J"))
    layer\x1b[2J
    """
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
