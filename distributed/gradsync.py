"""Keep the ranks one model: sum gradients, clip them by one norm, compare parameters.

Each rank's loss is its share of the global loss, so gradients are SUMMED, never averaged. The sync is called by hand
after the backward pass and looks only at `.grad`: however the submodules were called, nothing slips past it. (A wrapper
whose hooks fire on `forward` misses calls of its submodules, and the ranks drift apart without an error.)
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from distributed.collectives import all_reduce, gather_json, num_ranks

NamedParameters = Iterable[tuple[str, Tensor]]


def sync_gradients(params: Iterable[Parameter]) -> None:
    """Replace each gradient by its sum over ranks: one flat all-reduce a dtype.

    A missing gradient counts as zeros and becomes zeros, with one rank too, so that ranks and world sizes never
    disagree about which parameters the optimizer moves. Parameters that do not require a gradient are left out.
    """
    by_kind: dict[tuple[torch.dtype, torch.device], list[Parameter]] = {}
    for param in params:
        if param.requires_grad:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            assert param.grad.layout == torch.strided, "sparse gradients cannot be summed flat"
            by_kind.setdefault((param.dtype, param.device), []).append(param)
    if num_ranks() == 1:
        return
    for group in by_kind.values():
        grads = [param.grad for param in group if param.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        all_reduce(flat)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])


@torch.no_grad()
def clip_gradients(params: Iterable[Parameter], max_norm: float = float("inf")) -> Tensor:
    """Scale the synced gradients so that their global L2 norm is at most `max_norm`; return the norm before that.

    The norm is a 0-dim tensor on the gradients' device (no synchronisation), accumulated in fp32, or fp64 for fp64
    gradients. When it is NaN or infinite the gradients are left as they are: the caller sees the norm, skips the step.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; allowed: above 0 (inf only measures)")
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    norm_dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    norms = torch._foreach_norm(grads, 2, dtype=norm_dtype)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    if max_norm < float("inf"):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the same formula as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_(grads, torch.where(norm.isfinite(), scale, 1.0))
    return norm


def parameter_digests(named_params: NamedParameters) -> dict[str, str]:
    """SHA-256 of each parameter's dtype, shape and bytes, in name order."""
    digests = {}
    for name, param in sorted(named_params, key=lambda item: item[0]):
        assert name not in digests, name
        content = param.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{param.dtype} {tuple(param.shape)}\n".encode())
        digest.update(content.data)
        digests[name] = digest.hexdigest()
    return digests


def parameter_hash(named_params: NamedParameters) -> str:
    """SHA-256 over names and contents in name order. Copies the parameters to the CPU."""
    return _combine(parameter_digests(named_params))


def check_same_parameters(named_params: NamedParameters) -> str:
    """Compare the parameters of all ranks bit by bit; returns their hash.

    Raises RuntimeError on every rank, naming the first parameter that differs and the ranks that disagree with rank 0.
    """
    digests = parameter_digests(named_params)
    own_hash = _combine(digests)
    if len(set(gather_json(own_hash))) == 1:
        return own_hash
    by_rank = gather_json(digests)
    for name in sorted(set().union(*by_rank)):
        ranks = [r for r, other in enumerate(by_rank) if other.get(name) != by_rank[0].get(name)]
        if ranks:
            raise RuntimeError(
                f"parameter {name} differs between ranks: {_few(ranks)} disagree with rank 0. The ranks no longer "
                "train one model; resume from the last checkpoint"
            )
    raise AssertionError("hashes differ but no parameter does")


def _combine(digests: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()


def _few(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
