"""A matplotlib figure as SVG inside a page: in the page's colors, light or dark, and without fetching anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from geomprobe.errors import UsageError
from geomprobe.trace.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, in which the figures are drawn; the page shows each as its variable --line-N."""
ALARM = "#b00020"
"""The red in which plots name what is not certified."""

_INK, _GRID = "#010101", "#b0b0b0"
_OF_THE_PAGE: Mapping[str, str] = {
    _INK: "currentColor",
    _GRID: "var(--soft)",
    "#b2b2b2": "var(--edge)",  # the line at 0
    "#737373": "var(--soft)",  # the null model
    ALARM: "var(--alarm)",
    **{color: f"var(--line-{i})" for i, color in enumerate(LINES, 1)},
}
# A page is the same file each time, and shows the same text whatever fonts there are.
_SETTINGS: Any = {
    "font.size": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "geomprobe",
    "grid.color": _GRID,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_POINTERS = re.compile(r"^#(.+)$|url\(#(.+?)\)")
_STROKES = "stroke-linejoin: round; stroke-linecap: butt"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def inline(draw: Callable[[], Figure], name: str, alt: str) -> str:
    """A figure as one ``<svg>`` element, whose text is escaped.

    Args:
        draw: makes the figure; it is called with matplotlib's default settings and the page's colors.
        name: the start of every id in the element; no other figure of the page has it.
        alt: what the figure shows, for those who do not see it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("report needs matplotlib: pip install 'geomprobe[plot]'") from error
    written = StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's settings may hold any color, or want TeX
        matplotlib.rcParams.update(_SETTINGS)
        draw().savefig(written, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(written.getvalue())
    for parent in root.findall(".//{*}style/.."):  # a style sheet would act on the whole page; _STROKES replaces it
        for sheet in parent.findall("{*}style"):
            parent.remove(sheet)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {whole or inner for value in values for whole, inner in _POINTERS.findall(value)}
    for element in root.iter():
        attributes = {_bare(key): value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.tag = _bare(element.tag)
        element.attrib = {key: _placed(key, value, name) for key, value in attributes.items()}
    for size in ("width", "height", "version"):
        root.attrib.pop(size)
    root.attrib.update({"role": "img", "aria-label": printable(alt), "style": _STROKES})
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _bare(name: str) -> str:
    """A name without its namespace, as HTML wants it."""
    return name.rpartition("}")[2]


def _placed(key: str, value: str, name: str) -> str:
    """An attribute's value in the page: its ids start with the figure's name, its colors are the page's."""
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        return re.sub(r"#[0-9a-f]{6}\b", lambda color: _OF_THE_PAGE.get(color[0], color[0]), value)
    return _POINTERS.sub(lambda found: found[0].replace("#", f"#{name}-"), value)
