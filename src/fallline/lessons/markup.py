"""Markdown, formulas and code as HTML: formulas become MathML, code is coloured by classes; nothing needs a script."""

from __future__ import annotations

import html
from functools import cache
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

MATHML = "{http://www.w3.org/1998/Math/MathML}"
ELEMENTS = {
    "math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom", "mroot", "mrow",
    "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover",
}  # fmt: skip


def markdown(text: str) -> str:
    """Markdown as HTML; `$…$` and `$$…$$` hold formulas in LaTeX.

    >>> markdown("a *small* loss")
    '<p>a <em>small</em> loss</p>\\n'
    """
    return str(_parser().render(text))


def inline(text: str) -> str:
    """A line of Markdown as HTML, without a paragraph around it.

    >>> inline("`lr` is **0.1**")
    '<code>lr</code> is <strong>0.1</strong>'
    """
    return str(_parser().renderInline(text))


def code(source: str) -> str:
    """Python as HTML with classes for its words."""
    return str(highlight(source, PythonLexer(), HtmlFormatter(nowrap=True))).rstrip("\n")


def formula(latex: str, *, block: bool = False) -> str:
    """A formula in LaTeX as MathML, which keeps the LaTeX for those who copy it; what cannot be one, as it is written.

    >>> formula("x^2").startswith("<math")
    True
    """
    made = convert(latex, display="block" if block else "inline")
    if not _is_plain(made):
        return f"<code>{html.escape(latex.strip())}</code>"
    inner = made[made.index(">") + 1 : made.rindex("</math>")]
    start = made[: made.index(">") + 1]
    annotation = f'<annotation encoding="application/x-tex">{html.escape(latex.strip())}</annotation>'
    return f"{start}<semantics>{inner}{annotation}</semantics></math>"


def _is_plain(made: str) -> bool:
    """Whether a formula is nothing but one: text within LaTeX comes through with its markup, links and styles."""
    try:
        elements = list(ElementTree.fromstring(made).iter())
    except ElementTree.ParseError:
        return False
    tags = {element.tag.removeprefix(MATHML) for element in elements}
    attributes = {name for element in elements for name in element.attrib}
    return tags <= ELEMENTS and not any(name in ("href", "style") or name.startswith("on") for name in attributes)


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "highlight": _highlighted}).enable("table")
    parser.use(
        dollarmath_plugin,
        double_inline=False,
        renderer=lambda latex, options: formula(latex, block=options["display_mode"]),
    )
    return parser


def _highlighted(source: str, language: str, attributes: str) -> str:
    return code(source) if language == "python" else ""
