"""Formulas as MathML, which browsers draw by themselves: no script, and none from elsewhere."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def setup(app):
    """Register the renderer that conf.py names."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def inline(translator, node):
    """Write a formula within a line."""
    _write(translator, node, as_block=False)


def block(translator, node):
    """Write a formula of its own."""
    _write(translator, node, as_block=True)


def _write(translator, node, as_block):
    translator.body.append(tex2mathml(node.astext(), as_block=as_block))
    raise nodes.SkipNode
