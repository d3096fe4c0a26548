"""How `make docs` builds these pages into a site: Sphinx, MyST for Markdown, Furo for the looks; all of it offline."""

import importlib.metadata
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # fields.py, and the package of this very checkout

project = "palf_dist"
author = "the authors of palf_dist"
release = importlib.metadata.version("palf-dist")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "fields"]
source_suffix = {".md": "markdown"}

# The anchors of headings are those of a code host, so that a link holds on both.
myst_heading_anchors = 4
smartquotes = False  # --config is no dash

autodoc_typehints = "none"  # shapes and units stand in the docstrings
suppress_warnings = ["myst.header"]  # a page that a command writes begins with a heading of the third level
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
autoclass_content = "both"

html_theme = "furo"
html_title = f"palf_dist {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
