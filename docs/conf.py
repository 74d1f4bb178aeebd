"""The site: `make docs` builds it from this folder into build/site."""

import os
import sys
from pathlib import Path

# The examples are those of one backend; what a signature says is the same on all.
os.environ.setdefault("KERAS_BACKEND", "jax")
DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_ext"))

import normwise  # noqa: E402

project = "normwise"
author = "the authors of normwise"
copyright = f"{author}, Apache-2.0"
version = release = normwise.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    # Of this folder's _ext.
    "llms",
    "mathml",
    "measured",
    "reference",
]
exclude_patterns = ["_ext", "_templates", "generated", "measured", "pictures"]
templates_path = ["_templates"]

# The notebooks are stored with their output, which tests/test_notebooks.py compares with a run.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# What stands in single backticks in a docstring is code, and a link where it names something.
default_role = "py:obj"
autodoc_member_order = "bysource"
# An argument a line, where there is more than one line of them.
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# What several arguments have in common is said once.
napoleon_use_param = False
python_use_unqualified_type_names = True

html_title = "normwise"
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_baseurl = "https://normwise.github.io/normwise/"
html_math_renderer = "mathml"
html_show_sourcelink = False
# The words around what is found are asked of a server, which need not be there.
html_show_search_summary = False
html_copy_source = False
html_theme_options = {
    "github_url": "https://github.com/normwise/normwise",
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
# Pages with none beneath them.
ALONE = ("index", "install", "shares", "benchmarks", "changelog", "contributing", "security")
html_sidebars = {page: [] for page in ALONE}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
