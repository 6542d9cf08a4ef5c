"""Hooks of MkDocs for notebooks: links as on other pages, equations as MathML, and nothing loaded from elsewhere."""

import html
import re
from typing import Any

LOADERS = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->"
    r'|<script type="module">(?:(?!</script>).)*jp-Mermaid.*?</script>',
    re.DOTALL,
)
CODE = re.compile(r"(<(script|style|pre|code)\b.*?</\2>)", re.DOTALL)
EQUATION = re.compile(r"\$\$(.+?)\$\$|\$(\S[^$\n]*)\$", re.DOTALL)


def on_page_content(page_html: str, page: Any, **_: Any) -> str:
    """The page of a notebook for the site; other pages as they are.

    Raises:
        ValueError: it would load something from elsewhere.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return page_html
    changed = with_mathml(with_links(LOADERS.sub("", page_html)))
    if loads := re.findall(r'<script[^>]+src=|import\("https?:|<link[^>]+href="https?:|<img[^>]+src="https?:', changed):
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {loads}")
    return changed


def with_links(page_html: str) -> str:
    """``href="NAME.md"`` as ``href="../NAME/"``."""
    return re.sub(r'href="((?:\.\./)*[\w-]+)\.md(#[^"]*)?"', r'href="../\1/\2"', page_html)


def with_mathml(page_html: str) -> str:
    """``$...$`` and ``$$...$$`` outside code as MathML, which browsers show without a script."""
    parts = CODE.split(page_html)  # text, code, its tag, text, code, its tag, ...
    texts = [EQUATION.sub(_mathml, part) for part in parts[::3]]
    return "".join(text + code for text, code in zip(texts, [*parts[1::3], ""], strict=True))


def _mathml(equation: re.Match[str]) -> str:
    from latex2mathml.converter import convert  # of the extra "docs"

    block, inline = equation.groups()
    return convert(html.unescape(block or inline), display="block" if block else "inline")
