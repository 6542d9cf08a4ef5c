"""Hooks of MkDocs for notebooks: links as on other pages, equations as MathML, nothing loaded from elsewhere.

A notebook's stored outputs must also agree with those of the run that builds the site.
"""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

LOADERS = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->"
    r'|<script type="module">(?:(?!</script>).)*jp-Mermaid.*?</script>',
    re.DOTALL,
)
CODE = re.compile(r"(<(script|style|pre|code)\b.*?</\2>)", re.DOTALL)
PRINTED = re.compile(r'<div class="jp-RenderedText [^>]*>\s*<pre>(.*?)</pre>', re.DOTALL)
NUMBER = re.compile(r"\d+ s\b|\d+(?:\.\d+)?(?:e-?\d+)?")  # seconds are one as well, and may differ
ALIKE = 0.15  # relative, between processors and versions of torch
EQUATION = re.compile(r"\$\$(.+?)\$\$|\$(\S[^$\n]*)\$", re.DOTALL)


def on_page_content(page_html: str, page: Any, **_: Any) -> str:
    """The page of a notebook for the site; other pages as they are.

    Raises:
        ValueError: it would load something from elsewhere, or stored outputs differ from those of this run.
    """
    if not page.file.src_uri.endswith(".ipynb"):
        return page_html
    now = "".join(html.unescape(text) for text in PRINTED.findall(page_html))
    if not agree(stored := printed(Path(page.file.abs_src_path)), now):
        raise ValueError(
            f"{page.file.src_uri} printed\n{now}\nbut has stored\n{stored}\n(mkdocs.yml says how to store)."
        )
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


def printed(notebook: Path) -> str:
    """The text that a notebook stores as the outputs of its cells."""
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    texts = [output.get("text") or output["data"].get("text/plain", ()) for output in outputs if not _picture(output)]
    return "".join(map("".join, texts))


def _picture(output: dict[str, Any]) -> bool:
    return "image/png" in output.get("data", {})


def agree(stored: str, now: str) -> bool:
    """Whether two texts have the same words and nearly the same numbers, seconds left out."""
    if NUMBER.sub("#", stored).split() != NUMBER.sub("#", now).split():
        return False
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(now), strict=True)
    return all(
        math.isclose(float(one), float(other), rel_tol=ALIKE, abs_tol=1e-9)
        for one, other in pairs
        if not one.endswith(" s")
    )
