"""The environment variables that the native library reads, which itself cannot complain."""

import os
import re

INSTRUCTIONS = ("avx512", "avx2", "baseline")


def check():
    """Raise ValueError where a variable has a value that the library would not understand."""
    threads = os.environ.get("NORMWISE_NUM_THREADS")
    # No digits but ASCII's, which are all that C reads.
    if threads is not None and not re.fullmatch("0*[1-9][0-9]*", threads):
        raise ValueError(
            f"NORMWISE_NUM_THREADS={threads!r} is no number of threads; use a positive int, or "
            "unset it to have one for each CPU"
        )
    wanted = os.environ.get("NORMWISE_INSTRUCTIONS")
    if wanted not in (None, *INSTRUCTIONS):
        raise ValueError(
            f"NORMWISE_INSTRUCTIONS={wanted!r} names no instruction set; use "
            f"{', '.join(INSTRUCTIONS)}, or unset it to have the widest that the CPU has"
        )
