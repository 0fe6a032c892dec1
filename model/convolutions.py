"""The audio tower's two convolutions, on packed clips: mel slots in, tokens with their positions out.

The plain form is the published one on the whole pack, gaps included. Frozen and with Triton (`kernels`), both
convolutions are matrix products: nothing is computed for gap slots in the second one, and GELU, the mask, the gather
of tokens and the positions ride on the copies that the products need anyway (model/convolution_kernels.py).

Shapes: T mel frame slots, P packed tokens, D width, M mels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import uses_triton
from model.packing import AudioLayout

KERNEL_SIZE = 3


def embed_frames(
    mel_TM: Tensor,
    layout: AudioLayout,
    conv1: nn.Conv1d,
    conv2: nn.Conv1d,
    positions: nn.Embedding,
    kernels: str = "auto",
) -> Tensor:
    """x_PD in the dtype of `mel_TM`: GELU of both convolutions (3 wide, the second of stride 2) plus positions."""
    parameters = (conv1.weight, conv2.weight, positions.weight)
    is_frozen = not torch.is_grad_enabled() or not any(p.requires_grad for p in (mel_TM, *parameters))
    if is_frozen and all(p.dtype == mel_TM.dtype for p in parameters) and uses_triton(kernels, mel_TM):
        return _as_products(mel_TM, layout, conv1, conv2, positions)
    h_1DT = F.gelu(conv1(mel_TM.T[None]))
    # The second convolution pads each clip with zeros, not with what the first one makes of the gap.
    h_1DT = h_1DT.masked_fill(~layout.is_kept_T, 0.0)
    h_1DT = F.gelu(conv2(h_1DT))  # T slots -> T / 2
    x_PD = h_1DT[0].T[layout.token_slot_P]
    return x_PD + positions(layout.tokens.place_P).to(x_PD.dtype)


@torch.no_grad()
def _as_products(
    mel_TM: Tensor, layout: AudioLayout, conv1: nn.Conv1d, conv2: nn.Conv1d, positions: nn.Embedding
) -> Tensor:
    from model.convolution_kernels import add_positions, gather_patches

    num_slots, num_mels = mel_TM.shape
    # Row t of the patches is slots t - 1, t, t + 1, one after the other as they lie in memory.
    padded = F.pad(mel_TM, (0, 0, 1, 1))
    patches_T3M = padded.as_strided((num_slots, KERNEL_SIZE * num_mels), (num_mels, 1))
    h_TD = F.linear(patches_T3M, _as_matrix(conv1), conv1.bias)
    patches_P3D = gather_patches(h_TD, layout.is_kept_T, layout.token_slot_P)
    h_PD = F.linear(patches_P3D, _as_matrix(conv2), conv2.bias)
    return add_positions(h_PD, positions.weight, layout.tokens.place_P)


def _as_matrix(conv: nn.Conv1d) -> Tensor:
    """Weight [D, C, 3] as [D, 3 C], in the order of the patches."""
    return conv.weight.transpose(1, 2).flatten(1)
