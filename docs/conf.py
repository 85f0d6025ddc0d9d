"""The docs site: `sh scripts/docs.sh` builds it. Sources are the pages as they are, read from the repository's root."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxTranslator

import geomprobe

project = "geomprobe"
author = "the geomprobe developers"
version = release = geomprobe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**.md"]
exclude_patterns = [".*", "build", "runs", "data", "geomprobe*", "scripts", "tests"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"geomprobe {version}"
html_extra_path = ["front"]
html_show_sphinx = False
html_copy_source = False

myst_heading_anchors = 3  # the anchors that viewers of Markdown make
highlight_language = "none"  # indented blocks are commands

default_role = "literal"  # docstrings are written as Markdown is
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_mock_imports = ["lightning", "transformers", "accelerate"]  # each is in an environment of its own
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Raises (when training starts)", "Raises")]


def formula(writer: SphinxTranslator, node: nodes.Element) -> None:
    """MathML, which browsers draw by themselves, where the default loads MathJax from a network."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
