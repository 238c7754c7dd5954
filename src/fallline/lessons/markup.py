"""Markdown, formulas and code as HTML: formulas become MathML, code is coloured by classes; nothing needs a script."""

from __future__ import annotations

import html
from functools import cache

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer


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
    """A formula in LaTeX as MathML, which keeps the LaTeX for those who copy it.

    >>> formula("x^2").startswith("<math")
    True
    """
    made = convert(latex, display="block" if block else "inline")
    inner = made[made.index(">") + 1 : made.rindex("</math>")]
    start = made[: made.index(">") + 1]
    annotation = f'<annotation encoding="application/x-tex">{html.escape(latex.strip())}</annotation>'
    return f"{start}<semantics>{inner}{annotation}</semantics></math>"


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
