"""What MkDocs does beside its configuration."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the README's links to pages of the site; make text of those to other files."""
    if page.file.src_uri != "readme.md":
        return markdown
    within = re.sub(r"\]\(docs/([^)\s]+)\)", r"](site:\1)", markdown)
    text = re.sub(r"\[([^]]+)\]\((?!https?:|#|mailto:|site:)[^)\s]+\)", r"\1", within)
    return text.replace("](site:", "](")
