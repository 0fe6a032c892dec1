"""The formula against the tensors that a forward pass keeps alive, and the choice of layers against its definition."""

import pytest
import torch

import model.audio_tower
import model.text_tower
from lora.inject import inject_lora
from lora.settings import LoraSettings
from model.audio_tower import AudioConfig, AudioTower
from model.memory import LayerCost, bytes_needed, clips_in, layer_cost, parked, plan_layers
from model.packing import TextPack
from model.text_tower import TextConfig, TextTower
from tests.model.kept import bytes_kept

AUDIO = AudioConfig(d_model=40, num_layers=3, num_heads=2, ffn_dim=56, num_mels=8, max_positions=1500, pool=2)
TEXT = TextConfig(50, 40, 72, 3, 4, 2, 10, 128, 1e4, 1e-6)
FULL_AUDIO = AudioConfig(1280, 32, 20, 5120, 128, 1500, 2)
FULL_TEXT = TextConfig(151_936, 4096, 11_008, 32, 32, 32, 128, 8192, 1e4, 1e-6)


class Attention(torch.autograd.Function):
    """Keeps what the tiles keep: the joined projection, a number a row and head, and the result."""

    @staticmethod
    def forward(ctx, qkv_PJ, num_heads, width):
        out_PV = qkv_PJ[:, :width].clone()
        ctx.save_for_backward(qkv_PJ, qkv_PJ.new_zeros(num_heads, len(qkv_PJ)), out_PV)
        return out_PV

    @staticmethod
    def backward(ctx, grad_PV):
        raise AssertionError("only what is kept is looked at")


@pytest.fixture
def tile_attention(monkeypatch):
    def attention(qkv_PJ, heads, *_, **__):
        return Attention.apply(qkv_PJ, heads.num_heads, heads.num_heads * heads.head_dim)

    monkeypatch.setattr(model.audio_tower, "packed_attention", attention)
    monkeypatch.setattr(model.text_tower, "packed_attention", attention)


def kept_by(kind, num_checkpointed, kernels):
    """Bytes a token that a tower with adapters keeps; what does not grow with the tokens is left out."""
    tower = AudioTower(AUDIO, kernels=kernels) if kind == "audio" else TextTower(TEXT, kernels=kernels)
    tower.requires_grad_(False)
    if kind == "text":
        for layer in tower.layers:
            layer.mlp.join()
    inject_lora(tower, LoraSettings(lora_targets=("layers.*.self_attn.[qkv]_proj",), lora_r=4))
    tower.train().num_checkpointed = num_checkpointed
    counted = []
    for times in (1, 1, 3):  # the first run joins the projections, whose storage is no activation
        if kind == "audio":
            layout = tower.layout([1600, 640] * times, "cpu")
            mel_TM = torch.randn(len(layout.owner_T), 8)
            counted.append((bytes_kept(tower, lambda m=mel_TM, at=layout: tower(m, at)), layout.tokens.place_P.numel()))
        else:
            pack = TextPack(torch.arange(8 * times), [3, 5] * times)
            counted.append((bytes_kept(tower, lambda pack=pack: tower(pack)), 8 * times))
    _, (fewer, few), (more, many) = counted
    return (more - fewer) / (many - few)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter; test_saved counts a GPU's bytes")
@pytest.mark.usefixtures("tile_attention")
@pytest.mark.parametrize(("kind", "config"), [("audio", AUDIO), ("text", TEXT)])
def test_the_formula_is_what_a_forward_pass_keeps(kind, config):
    pytest.importorskip("triton", reason="counts what the Triton kernels keep")
    cost = layer_cost(config, itemsize=4)
    whole, fewer = kept_by(kind, 0, "triton"), kept_by(kind, 2, "triton")
    last_norm = 4 * 40 / (2 if kind == "audio" else 1)
    assert whole == pytest.approx(3 * cost.kept + last_norm, rel=0.02)
    assert whole - fewer == pytest.approx(2 * cost.saved, rel=0.02)


@pytest.mark.usefixtures("tile_attention")
@pytest.mark.parametrize(("kind", "config"), [("audio", AUDIO), ("text", TEXT)])
def test_the_formula_is_what_plain_torch_keeps(kind, config):
    cost = layer_cost(config, itemsize=4, fused=False)
    turned = 0 if kind == "audio" else 3 * 4 * (TEXT.num_heads + TEXT.num_kv_heads) * TEXT.head_dim  # by attention
    assert kept_by(kind, 0, "torch") + turned == pytest.approx(3 * cost.kept, rel=0.06)


def test_published_towers():
    audio, text = layer_cost(FULL_AUDIO), layer_cost(FULL_TEXT)
    assert audio.kept == 2 * (2 * 1280 + 3 * 1280 + 64 + 1280 + 5120) + 4 * (20 + 4)
    assert text.kept == 2 * (2 * 4096 + 3 * 4096 + 64 + 4096 + 22_016) + 4 * (32 + 2)
    assert audio.operations == 19_660_800
    assert text.operations == 4 * 4096**2 + 3 * 4096 * 11_008


def test_the_audio_tower_is_recomputed_first_and_no_more_than_needed():
    audio, text = layer_cost(FULL_AUDIO), layer_cost(FULL_TEXT)
    tokens = (30_000, 4_000)
    free = plan_layers(audio, text, *tokens, 1e15)
    assert (free.num_audio, free.num_text, free.fits) == (0, 0, True)
    last = (0, 0)
    for share in (0.99, 0.8, 0.6, 0.4, 0.3):
        plan = plan_layers(audio, text, *tokens, share * free.bytes_needed)
        assert plan.fits
        assert plan.bytes_needed <= share * free.bytes_needed
        assert plan.num_text == 0 or plan.num_audio == 32
        assert share < 0.9 or plan.num_audio < 6
        assert (plan.num_audio, plan.num_text) > last
        last = (plan.num_audio, plan.num_text)
        # One layer fewer would not do.
        fewer = (plan.num_audio - (plan.num_text == 0), max(0, plan.num_text - 1))
        assert bytes_needed(audio, text, *tokens, *fewer) > share * free.bytes_needed
    nothing_does = plan_layers(audio, text, *tokens, 1e6)
    assert (nothing_does.num_audio, nothing_does.num_text, nothing_does.fits) == (32, 32, False)


def test_the_peak_is_at_the_start_or_at_a_layer_that_is_whole_again():
    cost = LayerCost(num_layers=10, kept=100, kept_recomputed=10, work=5, operations=1)
    assert [cost.bytes_of(n, 2) for n in (0, 1, 9, 10)] == [2010, 1830, 2 * (190 + 5), 2 * (200 + 5)]
    assert cost.bytes_kept(10, 2) == 200
    other = LayerCost(num_layers=1, kept=7, kept_recomputed=7, work=3, operations=1)
    assert bytes_needed(cost, other, 10**6, 10**6, 10, 0) == max(16_384, 205, 100 + 10) * 10**6
    assert bytes_needed(cost, other, 0, 5, 0, 0) == 50


def test_a_side_without_tokens_is_left_alone():
    audio, text = layer_cost(FULL_AUDIO), layer_cost(FULL_TEXT)
    assert plan_layers(audio, text, 0, 4_000, 1e9).num_audio == 0


def test_what_does_not_fit_on_the_device_waits_on_the_host():
    audio, text = layer_cost(FULL_AUDIO), layer_cost(FULL_TEXT)
    tokens, room = (83 * 4000, 10 * 4000), 23 * 2**30
    assert not plan_layers(audio, text, *tokens, room).fits
    plan = plan_layers(audio, text, *tokens, room, may_park=True)
    assert plan.fits
    assert plan.parks
    assert not plan_layers(audio, text, 83 * 400, 4000, room, may_park=True).parks
    assert (parked(audio).kept_recomputed, parked(audio).kept) == (0, audio.kept)


def test_clips_that_fit():
    audio, text = layer_cost(FULL_AUDIO), layer_cost(FULL_TEXT)
    fitting = clips_in(audio, text, 80, 10, 2e10)
    assert plan_layers(audio, text, 80 * fitting, 10 * fitting, 2e10).num_audio == 0
    assert plan_layers(audio, text, 80 * (fitting + 1), 10 * (fitting + 1), 2e10).num_audio > 0
    assert clips_in(audio, text, 80, 10, -5.0) == 0
