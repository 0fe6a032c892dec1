"""Dropout masks that are never stored: a function of a seed and of the element's place, computed again in the backward.

Philox 4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; 7 rounds pass BigCrush).
Key: the 64-bit seed. Counter: (column // 8, row, 0, 0). Its four words give the 16-bit numbers of eight neighbours in a
row, in the order of WORDS, low half first; an element is dropped when its number is below `threshold(dropout)`.
The Triton kernels compute the same bits.

Shapes: P rows, I columns, G = ceil(I / 8) groups of columns.
"""

import torch
from torch import Tensor

NUM_ROUNDS = 7
GROUP = 8
WORDS = (0, 2, 1, 3)
_STEPS = 1 << 16
_LOW = 0xFFFFFFFF
_MULTIPLIERS, _KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def draw_seed(device: torch.device) -> Tensor:
    """int64 [1], from torch's own generator of the device: checkpointing, graph replay and resuming repeat it."""
    return torch.randint(0, 1 << 62, (1,), device=device)


def threshold(dropout: float) -> int:
    """How many of the 65,536 values of a 16-bit number mean a dropped element."""
    return round(dropout * _STEPS)


def keep_scale(dropout: float) -> float:
    """What kept elements are multiplied by: exact for the chance that `threshold` stands for."""
    return _STEPS / (_STEPS - threshold(dropout))


def keep_mask(seed_1: Tensor, num_rows: int, num_columns: int, dropout: float) -> Tensor:
    """bool [P, I], false with chance `dropout`. No work on the host."""
    device = seed_1.device
    key = [seed_1 & _LOW, seed_1 >> 32 & _LOW]
    num_groups = -(-num_columns // GROUP)
    group_PG = torch.arange(num_groups, device=device).expand(num_rows, num_groups)
    row_PG = torch.arange(num_rows, device=device)[:, None].expand(num_rows, num_groups)
    zero = torch.zeros_like(seed_1)
    words = [group_PG, row_PG, zero, zero]
    for _ in range(NUM_ROUNDS):
        # Products wrap at 64 bits, which leaves their bits as they are.
        first_PG, second_PG = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            (second_PG >> 32 & _LOW) ^ words[1] ^ key[0],
            second_PG & _LOW,
            (first_PG >> 32 & _LOW) ^ words[3] ^ key[1],
            first_PG & _LOW,
        ]
        key = [(part + step) & _LOW for part, step in zip(key, _KEY_STEPS, strict=True)]
    halves = [half for i in WORDS for half in (words[i] & 0xFFFF, words[i] >> 16)]
    return torch.stack(halves, dim=-1).flatten(1)[:, :num_columns] >= threshold(dropout)
