"""Which form of the losses runs: dense matrices or tiles, and the tiles by torch or by Triton."""

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache

import torch

from losses.settings import KERNEL_CHOICES

logger = logging.getLogger(__name__)

# Scores of a matrix from which on the tiles pay. With kernels they are quicker from about here (an H100: 6.4 ms against
# 5.0 at 4,096 x 4,096, 7.7 against 18 at 8,192 x 8,192); with plain torch they only keep the memory down.
TILED_FROM_TRITON = 2**24
TILED_FROM_TORCH = 2**26
# Scores of clips and bank from which on kernels search it: below, one product and torch's topk are quick enough.
SEARCHED_FROM = 2**27


@dataclass(frozen=True)
class LossKernels:
    tiled: bool
    triton: bool  # of the tiles, and of the search of a bank


def choose_kernels(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    num_clips: int,
    num_terms: int,
    own_scores: bool = False,
    num_bank: int = 0,
) -> LossKernels:
    """The same on every rank. wanted: "dense", "fused" or "auto", which is fused where the matrices of the global batch
    (num_clips, num_terms) are large, and searches a bank of num_bank terms by kernels where that is large.
    own_scores: the model scores the terms itself (maxsim), so there are matrices anyway.

    dense means without any kernel of ours. Triton needs a CUDA device and embeddings that are not fp64.
    """
    if wanted not in KERNEL_CHOICES:
        raise ValueError(f"loss_kernels is {wanted!r}; allowed: {', '.join(KERNEL_CHOICES)}")
    triton = wanted != "dense" and device.type == "cuda" and dtype != torch.float64 and has_triton()
    num_scores = num_clips * max(num_clips, num_terms)
    is_large = num_scores >= (TILED_FROM_TRITON if triton else TILED_FROM_TORCH)
    tiled = not own_scores and (wanted == "fused" or (wanted == "auto" and is_large))
    triton = triton and (wanted == "fused" or tiled or num_clips * num_bank >= SEARCHED_FROM)
    log_once(wanted, device.type, tiled, triton)
    return LossKernels(tiled, triton)


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def log_once(wanted: str, device: str, tiled: bool, triton: bool) -> None:
    """One line for each combination that occurs in a process."""
    form = "tiled, no matrix of scores is held" if tiled else "dense"
    by = "Triton" if triton else "torch"
    why = "" if triton or wanted == "dense" or device != "cuda" or has_triton() else "; triton is not installed"
    logger.info("losses: %s (%s on %s; --loss_kernels %s)%s", form, by, device, wanted, why)
