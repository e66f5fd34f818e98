"""What MkDocs does beside its configuration."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make text of the README's links to files, which are beside it and not part of the site."""
    if page.file.src_uri != "readme.md":
        return markdown
    return re.sub(r"\[([^]]+)\]\((?!https?:|#|mailto:)[^)\s]+\)", r"\1", markdown)
