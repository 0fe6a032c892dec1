"""Rotary positions against transformers, and as turns of a plane."""

import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from model.packing import SequenceLayout
from model.rotary import Rotary

THETA, HEAD_DIM = 10000.0, 8


def test_equals_transformers():
    layout = SequenceLayout.build([5, 2, 9], "cpu")
    x_PHD = torch.randn(16, 3, HEAD_DIM, dtype=torch.float64)
    rotary = Rotary.build(THETA, HEAD_DIM, layout.max_len, torch.float64, torch.device("cpu"))
    cos_PD, sin_PD = rotary.cos_LD[layout.place_P], rotary.sin_LD[layout.place_P]
    theirs, _ = apply_rotary_pos_emb(x_PHD, x_PHD, cos_PD, sin_PD)
    torch.testing.assert_close(rotary.turn(x_PHD, layout), theirs, rtol=1e-14, atol=1e-14)


def test_products_depend_on_the_distance_only():
    layout = SequenceLayout.build([12], "cpu")
    rotary = Rotary.build(THETA, HEAD_DIM, 12, torch.float64, torch.device("cpu"))
    q, k = (torch.randn(HEAD_DIM, dtype=torch.float64).expand(12, 1, HEAD_DIM) for _ in range(2))
    scores = rotary.turn(q, layout)[:, 0] @ rotary.turn(k, layout)[:, 0].T
    for distance in (0, 3, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotary.turn(q, layout).norm(dim=2), q.norm(dim=2), rtol=1e-12, atol=1e-12)
