"""The convolutions as matrix products against torch's, clips of every parity side by side."""

import pytest
import torch
from torch import nn

from model.convolutions import embed_frames
from model.packing import AudioLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLES = [160, 161, 480, 1600, 479_999]


@pytest.fixture
def front():
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv1d(6, 20, 3, padding=1), nn.Conv1d(20, 20, 3, stride=2, padding=1)
    return [part.to(DEVICE).requires_grad_(False) for part in (conv1, conv2, nn.Embedding(1500, 20))]


def make_input(samples, dtype=torch.float32):
    layout = AudioLayout.build(samples, 2, 3000, DEVICE)
    return torch.randn(len(layout.owner_T), 6).to(DEVICE, dtype), layout


def test_kernels_and_torch_agree(front, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # cuDNN's convolutions take it by default
    pytest.importorskip("triton", reason="compares with the Triton kernels")
    for samples in (SAMPLES[:4], SAMPLES[-1:] if DEVICE == "cuda" else SAMPLES[:1]):
        mel_TM, layout = make_input(samples)
        mel_TM = mel_TM.masked_fill(~layout.is_kept_T[:, None], 0.0)
        ours, plain = (embed_frames(mel_TM, layout, *front, kernels) for kernels in ("triton", "torch"))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_what_needs_a_gradient_takes_the_plain_path(front):
    mel_TM, layout = make_input([480, 161])
    front[0].weight.requires_grad_(True)
    x_PD = embed_frames(mel_TM, layout, *front, "auto" if DEVICE == "cpu" else "triton")
    assert torch.autograd.grad(x_PD.sum(), front[0].weight)[0].abs().sum() > 0
