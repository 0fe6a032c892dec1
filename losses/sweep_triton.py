"""The sweep over a bank on the GPU: one kernel and one matrix product a chunk (losses/sweep_kernels.py).

Shapes: B clips, K bank entries, E embedding, H hardest, Q (clip, entry) pairs, T tiles of the bank, W of a chunk.
"""

import torch
import triton
from torch import Tensor

from losses import sweep_kernels
from losses.infonce import floor_of
from losses.kernels import LOG2E, STEP, TILE
from losses.pairs import Pairs
from losses.sweep import LeftOut, Swept
from losses.tiled_triton import INTERPRETED, Operand, TileIndex, add_product, launch, reach_of

CHUNK = 2**15  # bank entries; with 1,024 clips 64 MiB of exponentials
BELOW_LIMIT = 60.0 * LOG2E


@torch.no_grad()
def sweep(audio_BE: Tensor, bank_KE: Tensor, left_out: LeftOut, limit_B: Tensor, k: int, inv_t: Tensor | None) -> Swept:
    """See losses.sweep.sweep."""
    (num_clips, dim), num_entries = audio_BE.shape, bank_KE.shape[0]
    num_top = min(k, num_entries)
    floor = floor_of(torch.empty(0, dtype=torch.float32))
    device = audio_BE.device
    if num_clips == 0 or num_entries == 0:
        top_BH = torch.full((num_clips, num_top), floor, device=device)
        lse_B = torch.full((num_clips,), -torch.inf, device=device)
        return Swept(
            top_BH, torch.zeros_like(top_BH, dtype=torch.int64), lse_B, torch.zeros(num_clips, dim, device=device)
        )
    limit_B = limit_B.float().contiguous()
    index = TileIndex.of(left_out.pairs_Q, num_clips, num_entries)
    is_out_K = torch.zeros(num_entries, dtype=torch.int8, device=device).index_fill_(0, left_out.entry_J, 1)
    a = Operand.of(audio_BE)
    num_tiles = triton.cdiv(num_entries, TILE)
    width = min(CHUNK, num_entries)
    pitch = triton.cdiv(width, 8) * 8
    tops_BT = torch.empty(num_clips, num_tiles if num_top else 0, device=device)
    p_BW = torch.empty(
        num_clips if inv_t is not None else 0,
        pitch,
        device=device,
        dtype=torch.float32 if INTERPRETED else torch.bfloat16,
    )
    part_WB = torch.empty(triton.cdiv(width, TILE), num_clips, device=device)
    scale = torch.ones((), device=device) if inv_t is None else inv_t.float() * LOG2E
    # The highest score a candidate can have: its limit, or the reach of unit rows and columns.
    reach = reach_of(audio_BE, bank_KE, scale / LOG2E)
    reference_B = torch.minimum(limit_B * scale, reach) - BELOW_LIMIT
    sum_B = torch.zeros(num_clips, device=device)
    mean_BE = torch.zeros(num_clips if inv_t is not None else 0, dim, device=device)
    for start in range(0, num_entries, width):
        stop = min(start + width, num_entries)
        b = Operand.of(bank_KE[start:stop])
        tiles_here = triton.cdiv(stop - start, TILE)
        launch(
            sweep_kernels.bank_tile,
            num_clips, stop - start,
            a.data, b.data, p_BW, tops_BT, part_WB, scale, limit_B, reference_B, is_out_K,
            index.starts_S, index.row_P, index.col_P,
            start, stop, num_clips, num_entries, a.data.stride(0), b.data.stride(0), pitch, num_tiles,
            E=a.width, SPLIT_A=a.is_split, SPLIT_B=b.is_split, SUMS=inv_t is not None, TOPS=num_top > 0,
        )  # fmt: skip
        if inv_t is not None:
            sum_B += part_WB[:tiles_here].sum(dim=0)
            add_product(mean_BE, p_BW[:, : stop - start], b.high(slice(None), dim), is_first=start == 0)
    lse_B = (sum_B.log2() + reference_B) / LOG2E
    mean_BE /= sum_B.clamp(min=torch.finfo(torch.float32).tiny)[: mean_BE.shape[0], None]
    top: tuple[Tensor | None, Tensor | None] = (None, None)
    if num_top:
        top = _hardest(audio_BE, bank_KE, left_out.pairs_Q, limit_B, is_out_K, tops_BT, num_top, floor)
    return Swept(*top, *((lse_B, mean_BE) if inv_t is not None else (None, None)))


def _hardest(
    audio_BE: Tensor,
    bank_KE: Tensor,
    left_Q: Pairs,
    limit_B: Tensor,
    is_out_K: Tensor,
    tops_BT: Tensor,
    k: int,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """The k highest candidates of each row, out of the k tiles with the highest maxima."""
    num_clips, num_tiles = tops_BT.shape
    num_looked_at = min(k, num_tiles)
    tile_BH = tops_BT.topk(num_looked_at, dim=1, sorted=False).indices
    row_Q, order_Q = left_Q.row_P.sort(stable=True)
    starts = torch.searchsorted(row_Q, torch.arange(num_clips + 1, device=row_Q.device), out_int32=True)
    cosine_BX = torch.empty(num_clips, num_looked_at * TILE, device=audio_BE.device)
    audio_BE, bank_KE = (x.float() if INTERPRETED else x for x in (audio_BE, bank_KE))
    sweep_kernels.rescore[(num_clips, num_looked_at)](
        audio_BE, bank_KE, tile_BH, limit_B, is_out_K, starts, left_Q.col_P[order_Q].int(), cosine_BX,
        bank_KE.shape[0], audio_BE.stride(0), bank_KE.stride(0), num_looked_at,
        E=audio_BE.shape[1], BN=TILE, BK=STEP,
    )  # fmt: skip
    top_BH, at_BH = cosine_BX.topk(k, dim=1)
    index_BH = tile_BH.gather(1, at_BH // TILE) * TILE + at_BH % TILE
    return top_BH.clamp(min=floor), index_BH.clamp(max=bank_KE.shape[0] - 1)
