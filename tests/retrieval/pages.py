"""HTML pages as the tests see them: well formed or not, what they load, what they say."""

from html.parser import HTMLParser

VOID = {"meta", "br", "input", "img", "link", "hr"}
LOADING = {"src", "href", "srcset", "poster", "action", "formaction", "background", "xlink:href", "data"}


class Page(HTMLParser):
    """Parses a page and demands that every element is closed in order. RAW text of scripts and styles is kept apart."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.loads: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text, self.raw = "", ""
        self.counts: dict[str, int] = {}
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.loads += [value or "" for name, value in attrs if name in LOADING]
        assert not any(name.startswith("on") for name, _ in attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw += data
        else:
            self.text += data
