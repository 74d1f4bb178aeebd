"""Pages and charts of what the benchmarks measured, from the JSON files in docs/measured."""


def setup(app):
    """Nothing yet."""
    return {"parallel_read_safe": True, "parallel_write_safe": True}
