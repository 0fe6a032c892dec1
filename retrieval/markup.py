"""Text into HTML: escaped, control characters shown, each term in its own writing direction."""

import html
import re
from collections.abc import Mapping

# What HTML cannot hold: C0 and C1 controls but for blanks, halves of surrogate pairs, non-characters. And the marks
# that turn the direction of the text after them, which could make one term rewrite the next.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")
MAX_SHOWN = 400


def text(value: object) -> str:
    """Safe between tags and in a quoted attribute. Longer than MAX_SHOWN characters: cut, with an ellipsis."""
    shown = str(value)
    if len(shown) > MAX_SHOWN:
        shown = f"{shown[: MAX_SHOWN - 1]}…"
    return html.escape(_UNSHOWABLE.sub("\ufffd", shown))


def bdi(value: object) -> str:
    """A string of unknown language: it runs in its own direction and leaves the text around it alone."""
    return f'<bdi dir="auto">{text(value)}</bdi>'


def facts_table(rows: Mapping[str, object], style: str = "") -> str:
    """Two columns: name and value."""
    body = "".join(f"<tr><td>{text(name)}</td><td>{bdi(value)}</td></tr>" for name, value in rows.items())
    return f'<table class="{" ".join(["facts", style]).strip()}"><tbody>{body}</tbody></table>'
