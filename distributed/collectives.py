"""What ranks tell one another: rows with their gradient, ints, numbers, JSON.

Shape letters: R rows of this rank, G rows of all ranks, E embedding, W ranks, K arrays sent together, F flat payload.

Every rank must make the same calls in the same order. Without a process group each function is the identity.
Ints, numbers and JSON travel on the CPU (gloo), so none of them waits for the GPU. Nothing is ever pickled.
"""

import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed.watch import count_collective

# torch 2.13 renamed the two and warns at each call of the old names, which 2.11 alone knows.
_torch_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_torch_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# --- torch's collectives, each counted, so that the watch can tell which rank is behind ------------------------------


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    count_collective()
    dist.all_reduce(tensor, op=op)


def _broadcast_from_0(tensor: Tensor) -> None:
    count_collective()
    dist.broadcast(tensor, src=0)


def _all_gather(all_W: Tensor, own: Tensor) -> None:
    count_collective()
    _torch_all_gather(all_W, own)


def _reduce_scatter(own: Tensor, all_W: Tensor) -> None:
    count_collective()
    _torch_reduce_scatter(own, all_W)


# --- who is there ----------------------------------------------------------------------------------------------------


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks. On the CPU: it does not wait for the GPU's queue."""
    if dist.is_initialized():
        all_reduce(torch.zeros(1))


# --- rows, with their gradient ---------------------------------------------------------------------------------------


def gather_rows(x_RE: Tensor, counts: Sequence[int], wire_dtype: torch.dtype | None = None) -> Tensor:
    """Rows of all ranks, rank 0's first: [R, E] -> [G, E], differentiable. See `gather_row_blocks`."""
    return gather_row_blocks([x_RE], [counts], wire_dtype)[0]


def gather_row_blocks(
    blocks: Sequence[Tensor], counts: Sequence[Sequence[int]], wire_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Several row blocks of all ranks in one collective, and one more in the backward pass.

    blocks: K tensors [R, E] of one float dtype on one device; R differs between blocks and ranks and may be 0, E may
    differ between blocks. counts[k][r]: the rows of block k on rank r. Returns K tensors [G, E], rank 0's rows first.

    The gradient of a row is the SUM of its gradients over all ranks, as in one process that holds all rows and adds all
    ranks' losses; it travels in the blocks' own dtype. `wire_dtype` (bf16) rounds the values sent, the same for every
    rank and for a rank's own rows; the rounding counts as the identity in the backward pass. With one rank nothing is
    sent or rounded.

    The backward pass is a collective too, so it must run on every rank or on none. Blocks without a gradient (a rank
    with no rows) take part all the same while gradients are enabled; the loss of each rank must depend on one of the
    results (if need be `+ 0 * rows_GE.sum()`). One call for all blocks of a step also fixes the order of collectives in
    the backward pass.
    """
    assert len(blocks) == len(counts) > 0, (len(blocks), len(counts))
    world_size, rank = num_ranks(), own_rank()
    for x_RE, block_counts in zip(blocks, counts, strict=True):
        assert x_RE.ndim == 2, x_RE.shape
        assert (x_RE.dtype, x_RE.device) == (blocks[0].dtype, blocks[0].device), (x_RE.dtype, x_RE.device)
        assert len(block_counts) == world_size, (block_counts, world_size)
        assert block_counts[rank] == x_RE.shape[0], (block_counts, x_RE.shape)
    if world_size == 1:
        return list(blocks)
    if torch.is_grad_enabled():
        blocks = [x_RE if x_RE.requires_grad else x_RE.detach().requires_grad_() for x_RE in blocks]
    return list(_GatherRowBlocks.apply([list(c) for c in counts], wire_dtype, *blocks))


class _GatherRowBlocks(torch.autograd.Function):
    """Each rank's payload holds every block, zero-padded to the largest rank's: all backends gather equal sizes."""

    @staticmethod
    def forward(
        ctx: Any, counts: list[list[int]], wire_dtype: torch.dtype | None, *blocks: Tensor
    ) -> tuple[Tensor, ...]:
        first = blocks[0]
        widths = [x_RE.shape[1] for x_RE in blocks]
        indices = [_valid_rows(block_counts, first.device) for block_counts in counts]
        ctx.counts, ctx.widths, ctx.indices = counts, widths, indices

        sizes = [max(c) * width for c, width in zip(counts, widths, strict=True)]
        own_F = first.new_zeros(sum(sizes), dtype=wire_dtype or first.dtype)
        for x_RE, part in zip(blocks, own_F.split(sizes), strict=True):
            part[: x_RE.numel()] = x_RE.reshape(-1)
        all_WF = own_F.new_empty(num_ranks(), own_F.numel())
        if own_F.numel():
            _all_gather(all_WF.view(-1), own_F)
        gathered = []
        for part_WF, block_counts, width, index_G in zip(all_WF.split(sizes, 1), counts, widths, indices, strict=True):
            rows = part_WF.reshape(num_ranks() * max(block_counts), width)
            rows_GE = rows if index_G is None else rows.index_select(0, index_G)
            gathered.append(rows_GE.to(first.dtype, copy=True))
        return tuple(gathered)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padded = []
        for grad_GE, block_counts, width, index_G in zip(grads, ctx.counts, ctx.widths, ctx.indices, strict=True):
            if index_G is not None:
                rows = grad_GE.new_zeros(num_ranks() * max(block_counts), width)
                grad_GE = rows.index_copy_(0, index_G, grad_GE)
            padded.append(grad_GE.reshape(num_ranks(), max(block_counts) * width))
        own_F = _reduce_scatter_sum(torch.cat(padded, 1))
        own_grads = []
        for part, block_counts, width in zip(
            own_F.split([p.shape[1] for p in padded]), ctx.counts, ctx.widths, strict=True
        ):
            num_rows = block_counts[own_rank()]
            own_grads.append(part[: num_rows * width].reshape(num_rows, width))
        return None, None, *own_grads


def _valid_rows(counts: list[int], device: torch.device) -> Tensor | None:
    """Positions of the real rows among the padded ones; None when there is no padding."""
    largest = max(counts)
    if min(counts) == largest:
        return None
    rows = torch.tensor([r * largest + i for r, count in enumerate(counts) for i in range(count)])
    if device.type == "cuda":
        rows = rows.pin_memory()  # other memory would make the host wait for the device's queue
    return rows.to(device, non_blocking=True)


def _reduce_scatter_sum(all_WF: Tensor) -> Tensor:
    """Row `own_rank()` of the sum over ranks."""
    if all_WF.numel() == 0:
        return all_WF[0]
    if all_WF.is_cuda:
        own_F = torch.empty_like(all_WF[0])
        _reduce_scatter(own_F, all_WF.contiguous().view(-1))
        return own_F
    summed_WF = all_WF.contiguous()  # gloo has no true reduce-scatter: its own version is this all-reduce as well
    all_reduce(summed_WF)
    return summed_WF[own_rank()]


# --- ints ------------------------------------------------------------------------------------------------------------


def gather_ints(values_R: Tensor) -> tuple[Tensor, list[int]]:
    """One int64 array of all ranks, rank 0's first, and each rank's count. See `gather_int_arrays`."""
    return gather_int_arrays([values_R])[0]


def gather_int_arrays(arrays: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    """K int64 arrays [R] of any lengths -> K pairs (all ranks' values [G], counts per rank), in two small collectives.

    The result lies on the device of the input; CUDA input costs a synchronisation, so pass CPU tensors.
    """
    for values_R in arrays:
        assert values_R.ndim == 1, values_R.shape
        assert values_R.dtype == torch.int64, values_R.dtype
    if num_ranks() == 1:
        return [(values_R, [values_R.numel()]) for values_R in arrays]
    own_counts = torch.tensor([values_R.numel() for values_R in arrays], dtype=torch.int64)
    counts_WK = own_counts.new_empty(num_ranks(), len(arrays))
    _all_gather(counts_WK.view(-1), own_counts)
    counts = counts_WK.tolist()
    payloads = _gather_payloads(torch.cat([values_R.cpu() for values_R in arrays]), [sum(c) for c in counts])
    parts = [payload.split(rank_counts) for payload, rank_counts in zip(payloads, counts, strict=True)]
    return [
        (torch.cat([rank_parts[k] for rank_parts in parts]).to(arrays[k].device), [c[k] for c in counts])
        for k in range(len(arrays))
    ]


def _gather_payloads(own_F: Tensor, sizes: list[int]) -> list[Tensor]:
    """Every rank's flat CPU payload, given everyone's size."""
    largest = max(sizes)
    padded_F = own_F.new_zeros(largest)
    padded_F[: own_F.numel()] = own_F
    all_WF = own_F.new_empty(num_ranks(), largest)
    if largest:
        _all_gather(all_WF.view(-1), padded_F)
    return [row[:size] for row, size in zip(all_WF, sizes, strict=True)]


# --- numbers ---------------------------------------------------------------------------------------------------------


def agree(**numbers: float) -> dict[str, float]:
    """The largest of each number over all ranks, in one all-reduce: a flag is then "on any rank" when above 0.

    Ranks must pass the same names, else ValueError on all of them. A NaN on any rank gives NaN (a bare MAX would drop
    it). Ints are exact up to 2**53.
    """
    names = sorted(numbers)
    values = [float(numbers[name]) for name in names]
    if num_ranks() == 1:
        return dict(zip(names, values, strict=True))
    name_hash = float(zlib.crc32("\n".join(names).encode()))
    sent = torch.tensor(
        [name_hash, -name_hash]
        + [float(math.isnan(v)) for v in values]
        + [-math.inf if math.isnan(v) else v for v in values],
        dtype=torch.float64,
    )
    all_reduce(sent, op=dist.ReduceOp.MAX)
    received = sent.tolist()
    if received[0] != -received[1]:
        raise ValueError(f"the ranks asked to agree on different names; rank {own_rank()} has {', '.join(names)}")
    is_nan, largest = received[2 : 2 + len(names)], received[2 + len(names) :]
    return {name: math.nan if nan else v for name, nan, v in zip(names, is_nan, largest, strict=True)}


def sum_over_ranks(**numbers: float) -> dict[str, float]:
    """The sum of each number over all ranks, in one fp64 all-reduce; the same bits on every rank."""
    names = sorted(numbers)
    sent = torch.tensor([float(numbers[name]) for name in names], dtype=torch.float64)
    if num_ranks() > 1:
        all_reduce(sent)
    return dict(zip(names, sent.tolist(), strict=True))


# --- small JSON values -----------------------------------------------------------------------------------------------


def gather_json(value: Any) -> list[Any]:
    """Every rank's small JSON value (strict: no NaN or infinity), by rank."""
    if num_ranks() == 1:
        return [json.loads(_json_bytes(value))]
    own = torch.frombuffer(bytearray(_json_bytes(value)), dtype=torch.uint8)
    size = torch.tensor([own.numel()])
    sizes = size.new_empty(num_ranks())
    _all_gather(sizes, size)
    return [json.loads(payload.numpy().tobytes()) for payload in _gather_payloads(own, sizes.tolist())]


def broadcast_json(value: Any) -> Any:
    """Rank 0's small JSON value, on all ranks; what the others pass is ignored."""
    if num_ranks() == 1:
        return json.loads(_json_bytes(value))
    own = torch.frombuffer(bytearray(_json_bytes(value if own_rank() == 0 else None)), dtype=torch.uint8)
    size = torch.tensor([own.numel()])
    _broadcast_from_0(size)
    payload = own if own_rank() == 0 else own.new_empty(int(size))
    _broadcast_from_0(payload)
    return json.loads(payload.numpy().tobytes())


class FailedOnRank0(RuntimeError):
    """What rank 0 was asked to do alone has failed there; rank 0 itself raises the error as it was."""


def on_rank_0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 alone; its small JSON value, or its failure, reaches all ranks.

    Rank 0 raises what `action` raised, the others a FailedOnRank0 with its text: nobody waits for a rank that failed.
    """
    failure, answer = None, None
    if own_rank() == 0:
        try:
            answer = {"value": json.loads(_json_bytes(action()))}
        except Exception as error:
            failure, answer = error, {"error": f"{type(error).__name__}: {error}"}
    answer = broadcast_json(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise FailedOnRank0(f"rank 0 failed: {answer['error']}")
    return answer["value"]


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
