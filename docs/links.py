"""A hook of MkDocs, which turns the links of pages into those of the site, but not the links of notebooks."""

import re
from typing import Any


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """The page with ``href="NAME.md"`` as ``href="../NAME/"``, if it is a notebook."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="((?:\.\./)*[\w-]+)\.md(#[^"]*)?"', r'href="../\1/\2"', html)
