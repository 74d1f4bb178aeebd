"""llms.txt: the pages of the site with their first sentences, for readers that are programs.

The form is that of https://llmstxt.org: a title, a summary, and sections of links.
"""

import re
from pathlib import Path

from docutils import nodes


def setup(app):
    """Write the file when the pages are written."""
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(app, exception):
    """Write the file beside the start page, unless the build failed or is of no site."""
    if exception is not None or app.builder.name != "html":
        return
    root = app.config.root_doc
    lines = [f"# {app.config.project}", "", f"> {first_sentence(app.env, root)}", ""]
    top = app.env.toctree_includes[root]
    lines += ["## Pages", "", *(line(app, page) for page in top), ""]
    for page in top:
        if below := list(pages_below(app.env, page)):
            lines += [f"## {title(app.env, page)}", "", *(line(app, each) for each in below), ""]
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines), encoding="utf-8")


def pages_below(env, page):
    """Every page under a page, in the order of the contents."""
    for each in env.toctree_includes.get(page, []):
        yield each
        yield from pages_below(env, each)


def title(env, page):
    """A page's title."""
    return env.titles[page].astext()


def line(app, page):
    """A page as a link with its first sentence."""
    address = app.config.html_baseurl + app.builder.get_target_uri(page)
    said = first_sentence(app.env, page)
    return f"- [{title(app.env, page)}]({address})" + (f": {said}" if said else "")


def first_sentence(env, page):
    """The first sentence of a page's first paragraph of words."""
    for paragraph in env.get_doctree(page).findall(nodes.paragraph):
        words = " ".join(paragraph.astext().split())
        if words:
            # Japanese ends a sentence by a sign of its own.
            first = re.split(r"\. |(?<=。)", words)[0]
            return first if first.endswith("。") else first.rstrip(".:") + "."
    return ""
