"""What the graph keeps: a stand-in for one tensor, and, through whole towers, nothing wide but what is listed here."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model.attention
import model.audio_tower
import model.text_tower
from model.audio_tower import AudioConfig, AudioTower
from model.packing import TextPack
from model.saved import remade
from model.text_tower import TextConfig, TextTower
from tests.model.kept import bytes_kept, wide_and_kept

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def parts():
    x = torch.randn(5, 6, requires_grad=True)
    weights = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
    return x, weights


def gradients(x, weights, uses_stand_in):
    made = []

    def remake():
        made.append(1)
        return x.detach().sin()

    y = x.sin()
    with remade(y, remake if uses_stand_in else None):
        out = sum(F.linear(y, weight).square().sum() for weight in weights)
    kept = weakref.ref(y)
    del y
    gc.collect()
    assert (kept() is None) == uses_stand_in
    grads = torch.autograd.grad(out, (x, *weights), retain_graph=True)
    again = torch.autograd.grad(out, (x, *weights))
    assert all(map(torch.equal, grads, again))
    assert len(made) == (2 if uses_stand_in else 0)  # once a backward pass, for three users
    return grads


def test_gradients_are_the_same_and_the_tensor_is_let_go(parts):
    for ours, kept in zip(gradients(*parts, True), gradients(*parts, False), strict=True):
        assert torch.equal(ours, kept)


def test_other_tensors_are_kept_as_they_are(parts):
    x, weights = parts
    y, other = x.sin(), x.cos()
    with remade(y, lambda: pytest.fail("not this one")):
        out = F.linear(other, weights[0])
    torch.autograd.grad(out.sum(), weights[0])


def test_nothing_happens_without_gradients(parts):
    x, weights = parts
    with torch.no_grad(), remade(x, lambda: pytest.fail("nothing is saved")):
        assert not F.linear(x, weights[0]).requires_grad


class Adapted(nn.Module):
    """A frozen linear layer with a trainable low-rank path, whose backward pass wants the input."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype, device=DEVICE))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype, device=DEVICE))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def adapt(tower):
    tower.requires_grad_(False)
    for layer in tower.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)))
    return tower.to(DEVICE).train()


counts_storages = pytest.mark.skipif(DEVICE == "cuda", reason="lists storages by weak references: on CPUs only")


@pytest.fixture
def bare_attention(monkeypatch):
    """Stands for the attention kernels, each of which keeps its own: qkv alone here."""

    def attention(qkv_PJ, heads, *_, **__):
        return qkv_PJ[:, : heads.num_heads * heads.head_dim].sin()

    monkeypatch.setattr(model.audio_tower, "packed_attention", attention)
    monkeypatch.setattr(model.text_tower, "packed_attention", attention)


@counts_storages
@pytest.mark.usefixtures("bare_attention")
@pytest.mark.parametrize("num_checkpointed", [0, 1])
def test_a_frozen_audio_tower_keeps_two_sums_a_layer_qkv_and_fc1(num_checkpointed):
    pytest.importorskip("triton", reason="counts what the Triton kernels keep")
    config = AudioConfig(d_model=40, num_layers=3, num_heads=2, ffn_dim=56, num_mels=8, max_positions=1500, pool=2)
    tower = adapt(AudioTower(config, kernels="triton"))
    tower.num_checkpointed = num_checkpointed
    layout = tower.layout([3200, 1600], DEVICE)
    mel_TM = torch.randn(len(layout.owner_T), 8, device=DEVICE)
    kept = wide_and_kept(tower, lambda: tower(mel_TM, layout), 15 * 40)
    layer = [(15, 40), (15, 40), (15, 120), (15, 56)]
    # A checkpointed layer keeps what came in: at first the stream alone. What comes after it starts with its delta.
    expected = [*layer * 3, (7, 40)] if not num_checkpointed else [(15, 40), *layer * 2, (7, 40)]
    assert kept == sorted(shape for shape in expected if math.prod(shape) >= 15 * 40)


@counts_storages
@pytest.mark.usefixtures("bare_attention")
def test_a_frozen_text_tower_keeps_two_sums_a_layer_qkv_and_gate_up():
    pytest.importorskip("triton", reason="counts what the Triton kernels keep")
    config = TextConfig(50, 40, 72, 3, 4, 2, 10, 128, 1e4, 1e-6)
    tower = adapt(TextTower(config, kernels="triton"))
    for layer in tower.layers:
        layer.mlp.join()
    pack = TextPack(torch.arange(12, device=DEVICE), [5, 7])
    kept = wide_and_kept(tower, lambda: tower(pack), 12 * 40)
    assert kept == sorted([(12, 40), (12, 40), (12, 80), (12, 144)] * 3 + [(12, 40)])


@pytest.mark.usefixtures("interpreter_takes_loaded_bounds")
@pytest.mark.parametrize("name", ["audio", "text"])
def test_with_attention_its_result_and_one_number_a_head_are_kept_too(monkeypatch, name):
    """In bf16, with attention by tiles. Nothing else of the size of the stream: half of it is the tolerance."""
    pytest.importorskip("triton", reason="counts what the Triton kernels keep")
    if DEVICE == "cpu":
        monkeypatch.setattr(model.attention, "resolve_backend", lambda *_: "tile")
    width, wide, num_layers, heads = 64, 96, 2, 4
    count, rows_each = (16, 100) if DEVICE == "cuda" else (2, 10)
    if name == "audio":
        config = AudioConfig(width, num_layers, heads, wide, num_mels=8, max_positions=1500, pool=2)
        tower = adapt(AudioTower(config, kernels="triton").bfloat16())
        layout = tower.layout([rows_each * 320] * count, DEVICE)
        mel_TM = torch.randn(len(layout.owner_T), 8, device=DEVICE)
        projected, expanded, statistics, last_rows = 3 * width, wide, 2, count * rows_each // 2
    else:
        config = TextConfig(50, width, wide, num_layers, heads, 2, 16, 128, 1e4, 1e-6)
        tower = adapt(TextTower(config, kernels="triton").bfloat16())
        for layer in tower.layers:
            layer.mlp.join()
        pack = TextPack(torch.arange(count * rows_each, device=DEVICE) % 50, [rows_each] * count)
        projected, expanded, statistics, last_rows = 2 * width, 2 * wide, 1, count * rows_each
    kept = bytes_kept(tower, lambda: tower(mel_TM, layout) if name == "audio" else tower(pack))
    rows = count * rows_each
    # Two sums, qkv, attention's result, the feed-forward's input to its activation; low-rank parts, statistics, heads.
    row = 2 * (2 * width + projected + width + expanded + 3 * 2) + 4 * (2 * statistics + heads)
    expected = num_layers * rows * row + last_rows * (2 * width + 4 * statistics)
    assert abs(kept - expected) < rows * width, (kept, expected)
