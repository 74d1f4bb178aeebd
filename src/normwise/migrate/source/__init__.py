"""Source code that uses TensorFlow Addons: found, rewritten and written back."""

from normwise.migrate.source.rewriting import Rewritten, rewrite_source

__all__ = ["Rewritten", "rewrite_source"]
