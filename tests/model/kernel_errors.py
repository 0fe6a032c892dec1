"""How far a kernel may be from the truth: no further than torch's own operations in the same dtype."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding's error; the interpreter cuts bf16 off where a GPU rounds it to the nearest.
UNIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
# In bf16 one rounding more than torch's would be 1.4 times its error. In fp32 a few last bits of a sum or of a square
# root decide, and rows may be only a few numbers long; a wrong formula is out by a thousand times.
FACTOR = {torch.float32: 1.5, torch.bfloat16: 1.1} if DEVICE == "cuda" else dict.fromkeys(UNIT, 2.5)


def assert_no_worse(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Root mean square error against the fp64 truth: at most that of torch's operations times a factor, or one rounding
    where theirs is smaller."""
    errors = [float((part - truth).detach().norm() / truth.detach().norm()) for part in (ours.double(), plain.double())]
    assert errors[0] <= max(UNIT[ours.dtype], FACTOR[ours.dtype] * errors[1]), errors
