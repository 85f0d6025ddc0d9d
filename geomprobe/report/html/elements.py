"""HTML that escapes whatever is put into it, and the one page that a report is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from geomprobe.report.html.style import STYLE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Markup(str):
    """Text that is HTML already. Every other string is escaped where it is put into a page."""


def tag(name: str, *children: str, **attributes: str | int) -> Markup:
    """An element; its children are escaped unless they are `Markup`, its attributes always.

    Attributes are given as Python names: ``class_`` is class, ``aria_label`` is aria-label.

    >>> tag("p", "1 < 2, ", tag("b", "R&D"), class_='"x"')
    '<p class="&quot;x&quot;">1 &lt; 2, <b>R&amp;D</b></p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Sequence[str]) -> Markup:
    """Several pieces as one, each escaped unless it is `Markup`.

    >>> join(["a & b", tag("br")])
    'a &amp; b<br></br>'
    """
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def section(name: str, title: str, *children: str) -> Markup:
    """A part of the page under its own heading, which ``#name`` leads to; nothing where it has no content.

    >>> section("files", "Files", tag("p", "none"))
    '<section id="files" aria-labelledby="files-h"><h2 id="files-h">Files</h2><p>none</p></section>'
    >>> section("files", "Files", "")
    ''
    """
    body = join(children)
    if not body:
        return body
    head = tag("h2", title, id=f"{name}-h")
    return tag("section", head, body, id=name, aria_labelledby=f"{name}-h")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> Markup:
    """A table whose first cell of a row names it, and whose columns numbered in ``right`` hold numbers.

    It scrolls by itself where the page is narrower.

    >>> "<th scope=\\"row\\">rsi</th><td class=\\"n\\">3</td>" in table("t", ["name", "rows"], [["rsi", "3"]], [1])
    True
    """

    def cell(i: int, text: str) -> Markup:
        if i == 0:
            return tag("th", text, scope="row")
        return tag("td", text, class_="n") if i in right else tag("td", text)

    heads = [
        tag("th", text, scope="col", class_="n") if i in right else tag("th", text, scope="col")
        for i, text in enumerate(header)
    ]
    body = [tag("tr", *(cell(i, text) for i, text in enumerate(row))) for row in rows]
    whole = tag(
        "table", tag("caption", title), tag("thead", tag("tr", *heads)), tag("tbody", *body, class_="rows")
    )
    return tag("div", whole, class_="wide", role="region", aria_label=title, tabindex=0)


def listed(facts: dict[str, str]) -> Markup:
    """Names and what they stand for, as a list of pairs.

    >>> listed({"seed": "0"})
    '<dl><div><dt>seed</dt><dd>0</dd></div></dl>'
    """
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", fact)) for name, fact in facts.items()))


def typeset(formula: str) -> str:
    """A formula or unit of the schema in the characters that a page has for it.

    >>> typeset("||G||^2")
    '‖G‖²'
    """
    return formula.replace("||", "‖").replace("^2", "²")


def page(title: str, *body: str) -> str:
    """The whole document: all that it shows is in it, and its policy keeps the browser from fetching more.

    >>> page("a < b", tag("p", "x")).count("a &lt; b")
    1
    """
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        tag("title", title),
        tag("style", Markup(STYLE)),
    ]
    return "\n".join(
        ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", tag("body", *body), "</html>", ""]
    )
