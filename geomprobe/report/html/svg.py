"""A matplotlib figure as SVG that lies in a page: in the page's colors, light or dark, and without fetching."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from geomprobe.errors import UsageError
from geomprobe.report.html.elements import Markup
from geomprobe.report.html.style import LINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@contextmanager
def page_colors() -> Iterator[None]:
    """Draws whatever is drawn meanwhile so that `inline` finds the colors that are the page's to choose.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("report needs matplotlib: pip install 'geomprobe[plot]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # her own settings may hold any color, or want TeX
        matplotlib.rcParams.update(_SETTINGS)
        yield


def inline(drawing: Figure, name: str, alt: str) -> Markup:
    """A figure as one ``<svg>`` element, within `page_colors`.

    Args:
        drawing: what was drawn.
        name: begins every id in it, and must be no other figure's.
        alt: what it shows, for those who do not see it.
    """
    written = StringIO()
    drawing.savefig(written, format="svg", transparent=True, metadata=_NO_METADATA)
    root = ElementTree.fromstring(written.getvalue())
    _unstyle(root)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {target for value in values for target in _targets(value)}
    for element in root.iter():
        element.tag = _bare(element.tag)
        attributes = {_bare(key): value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({key: _placed(key, value, name) for key, value in attributes.items()})
    for size in ("width", "height", "version"):
        root.attrib.pop(size)
    root.attrib.update({"role": "img", "aria-label": alt, "style": _STROKES})
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _unstyle(root: ElementTree.Element) -> None:
    """Take out the style sheet, which would be the whole page's; `_STROKES` says the same."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _bare(child.tag) == "style":
                parent.remove(child)


def _bare(name: str) -> str:
    """A name without its namespace, as HTML wants it."""
    return name.rpartition("}")[2]


def _targets(value: str) -> list[str]:
    """The ids that an attribute points to."""
    return [whole or inner for whole, inner in _POINTERS.findall(value)]


def _placed(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        return re.sub(r"#[0-9a-f]{6}\b", lambda color: _OF_THE_PAGE.get(color[0], color[0]), value)
    return _POINTERS.sub(lambda found: found[0].replace("#", f"#{name}-"), value)
