"""Tokenizers that worker processes of the tests can rebuild."""

from __future__ import annotations

from collections.abc import Sequence


class ByteCodes:
    """A string's bytes."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def recipe(self) -> tuple[str, str]:
        return "tests.data.tokens:restored", "ByteCodes"


class NoTokens:
    """A broken one."""

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [[] for _ in texts]

    def recipe(self) -> tuple[str, str]:
        return "tests.data.tokens:restored", "NoTokens"


def restored(name: str) -> ByteCodes | NoTokens:
    return {"ByteCodes": ByteCodes, "NoTokens": NoTokens}[name]()
