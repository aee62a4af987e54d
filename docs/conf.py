"""Settings of Sphinx, which makes a site of these pages and of the library's docstrings."""

import re
from importlib import metadata

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "balanced-learning"
release = metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
autodoc_typehints = "none"  # the docstrings give types with their shapes
napoleon_custom_sections = ["Shape", "Export", "Reference"]
napoleon_use_ivar, napoleon_use_param, napoleon_use_rtype = True, False, False  # most types are no links
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torchvision|dataclasses)\..*"),  # whose pages are in the network
    ("py:class", r"Tensor|[A-Z]|\d"),  # as in Tensor[M, 4]
]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_copyright = False
html_show_sourcelink = False
html_math_renderer = "mathml"


def visit_math(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Writes an equation as MathML, which browsers show without a script and without the network."""
    mathml = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    # Browsers would set these apart from what they stand beside, like relations.
    mathml = re.sub(r"<mo([^>]*)>([|/])</mo>", r'<mo\1 lspace="0" rspace="0">\2</mo>', mathml)
    translator.body.append(mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
