"""Random problems for the tiled losses, and the same by the dense reference in fp64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from losses.infonce import multi_positive_cross_entropy, weighted_sum
from losses.pairs import Pairs
from losses.sweep import LeftOut
from losses.tiled import Match, contrast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Result = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, d rows, d columns, d (1 / temperature)


def need_triton() -> None:
    """Kernels run on CUDA, or in Triton's interpreter (tests/conftest.py asks for it where there is no GPU)."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run, nor be interpreted")


def unit_rows(num: int, dim: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(num, dim, dtype=torch.float64, generator=generator), dim=1)


@dataclass
class Problem:
    rows_RE: Tensor
    cols_CE: Tensor
    inv_t: Tensor
    match: Match
    positives_RC: Tensor
    row_out_RC: Tensor  # left out of the rows' denominators
    col_out_RC: Tensor  # of the columns'
    log_count_C: Tensor
    row_weight_R: Tensor
    col_weight_C: Tensor

    def by_tiles(self, triton: bool) -> Result:
        leaves = [x.detach().clone().requires_grad_() for x in (self.rows_RE, self.cols_CE, self.inv_t)]
        loss_R, loss_C = contrast(leaves[0], leaves[1], leaves[2], self.match, triton)
        assert loss_R.dtype == (torch.float64 if self.rows_RE.dtype == torch.float64 else torch.float32)
        loss = weighted_sum(loss_R, self.row_weight_R)
        if self.match.is_symmetric:
            loss = loss + weighted_sum(loss_C, self.col_weight_C)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def by_masks(self) -> Result:
        leaves = [x.detach().double().clone().requires_grad_() for x in (self.rows_RE, self.cols_CE, self.inv_t)]
        scores_RC = leaves[0] @ leaves[1].T * leaves[2]
        loss_R = multi_positive_cross_entropy(scores_RC, self.positives_RC, self.row_out_RC, self.log_count_C)
        loss = weighted_sum(loss_R, self.row_weight_R)
        if self.match.is_symmetric:
            loss_C = multi_positive_cross_entropy(scores_RC.T, self.positives_RC.T, self.col_out_RC.T)
            loss = loss + weighted_sum(loss_C, self.col_weight_C)
        return loss.detach(), *torch.autograd.grad(loss, leaves)


def problem(
    seed: int,
    num_rows: int,
    num_cols: int,
    dim: int = 5,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64),
    symmetric: bool = True,
    keys: bool = False,
    inv_t: float = 14.0,
    dense_ignored: float = 0.2,
    device: str = "cpu",
) -> Problem:
    """Every option at once: columns and rows in no denominator, ignored pairs, multiplicities, padded pairs, rows
    without a positive. keys: equal keys are positives, and what has no key is in no denominator (as chunk texts)."""
    generator = torch.Generator().manual_seed(seed)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < share

    rows_RE = unit_rows(num_rows, dim, generator).to(dtypes[0])
    cols_CE = unit_rows(num_cols, dim, generator).to(dtypes[1])
    count_C = torch.randint(1, 4, (num_cols,), generator=generator).double()
    ignored_RC = torch.zeros(num_rows, num_cols, dtype=torch.bool)
    if keys:
        num_keys = max(1, min(num_rows, num_cols))
        key_R, key_C = (
            torch.randint(-1, num_keys, (n,), generator=generator, dtype=torch.int32) for n in (num_rows, num_cols)
        )
        positives_RC = (key_R[:, None] == key_C) & (key_R >= 0)[:, None]
        col_is_out_C, row_is_out_R, count_C = key_C < 0, key_R < 0, torch.ones_like(count_C)
    else:
        positives_RC = chance(min(0.3, 2 / max(1, num_cols)), num_rows, num_cols)
        col_is_out_C = chance(0.2, num_cols) & ~positives_RC.any(dim=0)
        row_is_out_R = chance(0.2, num_rows) & ~positives_RC.any(dim=1)
        ignored_RC = chance(dense_ignored, num_rows, num_cols) & ~positives_RC
        if num_rows:
            ignored_RC[0] = ~positives_RC[0]  # nothing but positives is left of it, or nothing
    num_of_row_R, num_of_col_C = (positives_RC.sum(dim=d).clamp(min=1).double() for d in (1, 0))
    row_bias_R = torch.zeros(num_rows).masked_fill(row_is_out_R, -torch.inf).to(device)
    match = Match(count_C.log().masked_fill(col_is_out_C, -torch.inf).to(device), row_bias_R if symmetric else None)
    if keys:
        tables = [x.to(device) for x in (key_R, key_C, 1 / num_of_row_R, 1 / num_of_col_C)]
        match = Match(match.col_bias_C, match.row_bias_R, None, None, None, None, *tables)
    else:
        total_R1 = (positives_RC * count_C).sum(dim=1, keepdim=True).clamp(min=1)
        num_padded = 1 if num_rows and num_cols else 0
        places = [torch.cat([x, x.new_full((num_padded,), -1)]) for x in positives_RC.nonzero().T]
        share_RC = positives_RC * count_C / total_R1
        shares = [s[places[0], places[1]] for s in (share_RC, positives_RC / num_of_col_C)]
        ignored = Pairs(*(torch.cat([x.new_full((num_padded,), -1), x]) for x in ignored_RC.nonzero().T)).to(device)
        positives, shares = Pairs(*places).to(device), [x.to(device) for x in shares]
        match = Match(match.col_bias_C, match.row_bias_R, ignored, positives, *shares)
    weights = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (num_rows, num_cols)]
    moved = [
        x.to(device)
        for x in (
            positives_RC,
            ignored_RC | col_is_out_C,
            ignored_RC | row_is_out_R[:, None],
            count_C.log(),
            weights[0] * positives_RC.any(dim=1),
            weights[1] * positives_RC.any(dim=0),
        )
    ]
    t = torch.tensor(inv_t, dtype=torch.promote_types(dtypes[0], torch.float32), device=device)
    return Problem(rows_RE.to(device), cols_CE.to(device), t, match, *moved)


def errors(found: Result, expected: Result) -> list[float]:
    """Largest difference of each, over the largest number of the expected one."""
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3)) if a.numel() else 0.0
        for a, b in zip(found, expected, strict=True)
    ]


@dataclass
class BankProblem:
    audio_BE: Tensor
    bank_KE: Tensor
    limit_B: Tensor
    left_out: LeftOut
    inv_t: Tensor
    weight_B: Tensor

    def by_masks(self, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(lse, d audio, d (1 / temperature), top cosines, all cosines) in fp64; those left out are -9."""
        audio_BE = self.audio_BE.detach().double().requires_grad_()
        inv_t = self.inv_t.detach().double().requires_grad_()
        cosine_BK = audio_BE @ self.bank_KE.double().T
        out_BK = cosine_BK.detach() > self.limit_B[:, None]
        out_BK[self.left_out.pairs_Q.row_P, self.left_out.pairs_Q.col_P] = True
        out_BK[:, self.left_out.entry_J] = True
        lse_B = (cosine_BK * inv_t).masked_fill(out_BK, -1e30).logsumexp(dim=1)
        grads = torch.autograd.grad((lse_B * self.weight_B).sum(), (audio_BE, inv_t))
        cosine_BK = cosine_BK.detach().masked_fill(out_BK, -9.0)
        top_BH = cosine_BK.topk(min(k, cosine_BK.shape[1]), dim=1).values
        return lse_B.detach(), *grads, top_BH, cosine_BK


def bank_problem(
    seed: int, num_clips: int, num_entries: int, dim: int, dtype: torch.dtype, inv_t: float = 14.0, device: str = "cpu"
) -> BankProblem:
    """The first clip has no candidate at all."""
    generator = torch.Generator().manual_seed(seed)
    audio_BE, bank_KE = (unit_rows(n, dim, generator).to(dtype).to(device) for n in (num_clips, num_entries))
    statistics = torch.promote_types(dtype, torch.float32)
    limit_B = (torch.rand(num_clips, generator=generator) * 0.5).to(statistics)
    limit_B[:1] = -2.0
    row_Q = torch.randint(0, num_clips, (10,), generator=generator)
    entry_Q = torch.randint(0, num_entries, (10,), generator=generator)
    entry_J = torch.randint(0, num_entries, (num_entries // 10,), generator=generator)
    weight_B = torch.rand(num_clips, generator=generator, dtype=torch.float64)
    weight_B[:1] = 0.0
    left_out = LeftOut(Pairs(row_Q, entry_Q).to(device), entry_J.to(device))
    temperature = torch.tensor(inv_t, dtype=statistics, device=device)
    return BankProblem(audio_BE, bank_KE, limit_B.to(device), left_out, temperature, weight_B.to(device))
