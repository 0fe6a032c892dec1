"""Index tables made on the CPU from host integers, and moved to the device in one copy.

Shapes: B sequences, P packed elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tables:
    """int64 tables one after another in one tensor, so that they travel in one copy."""

    flat: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def join(cls, tables: Sequence[Tensor]) -> "Tables":
        return cls(torch.cat(list(tables)), tuple(len(table) for table in tables))

    def to(self, device: torch.device | str) -> "Tables":
        """A copy on the device, asynchronous from pinned memory: the host does not wait."""
        is_cuda = torch.device(device).type == "cuda"
        flat = self.flat.pin_memory() if is_cuda else self.flat
        return replace(self, flat=flat.to(device, non_blocking=True))

    def parts(self) -> tuple[Tensor, ...]:
        return self.flat.split(self.sizes)


def sequence_tables(lengths: Sequence[int]) -> list[Tensor]:
    """Cumulative lengths [B + 1], owner and place of each packed element, int64 on the CPU."""
    lengths_B = torch.tensor(list(lengths), dtype=torch.int64)
    cu = torch.zeros(len(lengths_B) + 1, dtype=torch.int64)
    torch.cumsum(lengths_B, 0, out=cu[1:])
    owner = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)
    return [cu, owner, torch.arange(len(owner)) - cu[:-1][owner]]
