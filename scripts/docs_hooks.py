"""A hook of mkdocs: links from the pages to files of the repository become plain text on the site."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Pages are read in the repository too, where these links lead somewhere."""
    return _OUTSIDE.sub(r"\1", markdown)
