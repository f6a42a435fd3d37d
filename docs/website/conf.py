"""Sphinx's configuration; ``website.build`` prepares the sources."""

from __future__ import annotations

import lightning_fastmoe

project = "lightning-fastmoe"
author = "the lightning_fastmoe authors"
project_copyright = author
release = version = lightning_fastmoe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4  # GitHub's anchors

html_theme = "furo"
html_title = "lightning-fastmoe"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "default"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # a documented attribute of a dataclass is also one of its fields
