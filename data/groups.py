"""Variant groups as sorted arrays: which group stands for which (aliases), and which groups may be masked.

Arrays, since sets of Python integers would take some 70 bytes an entry in every worker process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np


class GroupMap:
    """Groups that a glossary's aliases replace by another group; all others stand for themselves."""

    def __init__(self, replaced: Mapping[int, int] | None = None) -> None:
        pairs = sorted((replaced or {}).items())
        self.replaced_R = np.array([old for old, _ in pairs], dtype=np.int64)
        self.by_R = np.array([new for _, new in pairs], dtype=np.int64)
        self._by = dict(pairs)

    def __getitem__(self, group: int) -> int:
        return self._by.get(group, group)

    def apply(self, groups_N: np.ndarray) -> np.ndarray:
        """The groups (int64 [N]) that stand for the given ones."""
        if not len(self.replaced_R):
            return groups_N
        place_N = np.minimum(np.searchsorted(self.replaced_R, groups_N), len(self.replaced_R) - 1)
        return np.where(self.replaced_R[place_N] == groups_N, self.by_R[place_N], groups_N)


class GroupSet:
    """A set of groups: `sorted_M` int64, each once."""

    def __init__(self, groups: Iterable[int] | np.ndarray = (), *, is_sorted: bool = False) -> None:
        values = groups if isinstance(groups, np.ndarray) else np.array(list(groups), dtype=np.int64)
        self.sorted_M = values if is_sorted else np.unique(values)

    def __len__(self) -> int:
        return len(self.sorted_M)

    def holds(self, groups_N: np.ndarray) -> np.ndarray:
        """bool [N]: which of the groups are in the set."""
        if not len(self.sorted_M):
            return np.zeros(len(groups_N), dtype=bool)
        place_N = np.minimum(np.searchsorted(self.sorted_M, groups_N), len(self.sorted_M) - 1)
        return self.sorted_M[place_N] == groups_N
