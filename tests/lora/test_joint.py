"""The joint projection against its three layers: values, gradients, what it keeps, and the frozen storage's views."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora.adapter import load_adapter, save_adapter
from lora.inject import inject_lora
from lora.joint import NAMES, JointProjection, join_projections
from lora.mask import draw_seed, keep_mask, keep_scale
from lora.merge import fold, merge, merged_state_dict, unmerge
from lora.settings import LoraSettings

R = 3


class Projections(nn.Module):
    """An attention module's projections: k and v may be narrower, k has no bias."""

    def __init__(self, width, kv_width):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, kv_width)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.joint_projection = None

    def forward(self, x):
        return self.joint_projection(x) if self.joint_projection is not None else self.apart(x)

    def apart(self, x):
        return torch.cat([getattr(self, name)(x) for name in NAMES], dim=-1)


class Model(nn.Module):
    def __init__(self, width=8, kv_width=4):
        super().__init__()
        self.audio_tower = nn.Module()
        self.audio_tower.self_attn = Projections(width, kv_width)

    def forward(self, x):
        return self.audio_tower.self_attn(x)


def make(adapted="qkv", dropout=0.0, dtype=torch.float64, width=8, kv_width=4, r=R, joint=True):
    torch.manual_seed(0)
    model = Model(width, kv_width).to(dtype).requires_grad_(False)
    lora = LoraSettings(r, 2 * r, dropout, tuple(f"*.{name}_proj" for name in adapted), lora_joint=joint)
    inject_lora(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.train()


def by_hand(attention, x, keep):
    """The three layers' formula on plain tensors, one mask."""
    parts = []
    for name in NAMES:
        layer = getattr(attention, name)
        base = getattr(layer, "base_layer", layer)
        y = nn.functional.linear(x, base.weight, base.bias)
        if layer is not base:
            y = y + (x * keep) @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
        parts.append(y)
    return torch.cat(parts, dim=-1)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.sampled_from([(3,), (1,), (2, 3), (2, 1, 2)]),
    adapted=st.sampled_from(["qkv", "qv", "k", "q"]),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    contiguous=st.booleans(),
)
def test_equals_the_three_layers(seed, rows, adapted, dropout, contiguous):
    model = make(adapted, dropout)
    x = torch.randn(*rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    given_x = x if contiguous else x.transpose(-1, 0).contiguous().transpose(-1, 0)
    torch.manual_seed(seed)
    mask_seed = draw_seed(x.device)
    num_rows = x.numel() // 8
    keep = keep_mask(mask_seed, num_rows, 8, dropout).view(x.shape).double() * keep_scale(dropout) if dropout else 1.0
    torch.manual_seed(seed)
    results = []
    for y in (model(given_x), by_hand(model.audio_tower.self_attn, x, keep)):
        grad_y = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
        results.append((y.detach(), *torch.autograd.grad(y, (x, *trained(model)), grad_y)))
    assert len(results[0]) == 2 + 2 * len(adapted)
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < 1e-12


def test_all_of_it_is_one_setting():
    for lora_settings in (LoraSettings(lora_fused=False), LoraSettings(lora_joint=False)):
        lora_settings.lora_targets = ("*.q_proj",)
        model = Model()
        inject_lora(model, lora_settings)
        assert model.audio_tower.self_attn.joint_projection is None
    assert isinstance(make().audio_tower.self_attn.joint_projection, JointProjection)
    assert join_projections(nn.Sequential(nn.Linear(2, 2))) == 0


def test_dropout_is_real_shared_and_absent_in_evaluation():
    model, x = make(dropout=0.3), torch.randn(6, 8, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.allclose(model(x), model.audio_tower.self_attn.apart(x), atol=1e-12)


def test_checkpointing_replays_the_same_mask():
    gradients = []
    for checkpointed in (False, True):
        model, x = make(dropout=0.3), torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(4)
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        torch.rand(5)
        y.square().sum().backward()
        gradients.append([p.grad for p in trained(model)])
    for direct, replayed in zip(*gradients, strict=True):
        assert direct.abs().max() > 0
        assert torch.equal(direct, replayed)


def test_keeps_x_itself_and_nothing_as_wide():
    num_rows = 500
    model = make(dropout=0.1, dtype=torch.bfloat16, width=96, kv_width=48)
    x = torch.randn(num_rows, 96).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    wide = [t for t in kept if t.numel() >= num_rows * 48 and t.dim() == 2 and t.shape[0] == num_rows]
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]
    assert all(t.shape[1] <= 64 or t.data_ptr() == x.data_ptr() for t in wide)  # x, and `low` with its padding


def test_an_input_that_needs_no_gradient_gets_no_product():
    model, x = make(width=64, kv_width=32), torch.randn(50, 64, dtype=torch.float64)
    flops = []
    for needs in (False, True):
        y = model(x.clone().requires_grad_(needs))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] >= 2 * 50 * 64 * 128


def test_a_frozen_master_gets_no_gradient():
    model = make()
    model.audio_tower.self_attn.q_proj.lora_A.requires_grad_(False)
    model.audio_tower.self_attn.v_proj.lora_B.requires_grad_(False)
    model(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    assert model.audio_tower.self_attn.q_proj.lora_A.grad is None
    assert model.audio_tower.self_attn.v_proj.lora_B.grad is None
    assert model.audio_tower.self_attn.k_proj.lora_A.grad.abs().max() > 0


def test_a_backward_after_the_adapters_changed_is_refused():
    model = make()
    y = model(torch.randn(3, 8, dtype=torch.float64))
    with torch.no_grad():
        model.audio_tower.self_attn.q_proj.lora_B.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


@pytest.mark.parametrize("adapted", ["qkv", "qv"])
def test_state_dicts_stay_and_load_into_the_shared_storage(adapted):
    model, apart = make(adapted), make(adapted, joint=False)
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x)
    before, after = apart.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    joined = model.audio_tower.self_attn.joint_projection.joined
    assert all(t.untyped_storage().data_ptr() != joined.weight_OE.data_ptr() for t in before.values())
    storages = {t.untyped_storage().data_ptr() for name, t in after.items() if "lora" not in name}
    assert storages == {joined.weight_OE.data_ptr(), joined.bias_O.data_ptr()}  # once, not twice
    changed = {name: torch.randn_like(value) for name, value in before.items()}
    model.load_state_dict(changed)
    apart.load_state_dict(changed)
    assert model.audio_tower.self_attn.joint_projection.joined is joined
    assert torch.allclose(model(x), apart(x), atol=1e-12)
    assert model.audio_tower.self_attn.joint_projection.joined is joined
    apart.load_state_dict(before)
    model.load_state_dict({name: value.clone() for name, value in before.items()}, assign=True)
    assert torch.allclose(model(x), apart(x), atol=1e-12)


def test_copies_and_moves_join_anew():
    model, x = make(), torch.randn(5, 8, dtype=torch.float64)
    before = model(x)
    other = copy.deepcopy(model)
    attention = other.audio_tower.self_attn
    assert attention.joint_projection.module is attention
    assert attention.joint_projection.joined is None
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(x), before)
    assert torch.allclose(other(x), attention.apart(x), atol=1e-12)
    single = model.float()
    assert torch.allclose(single(x.float()), single.audio_tower.self_attn.apart(x.float()), atol=1e-5)


def test_joined_in_inference_mode_still_trains():
    model = make()
    with torch.inference_mode():
        model(torch.randn(5, 8, dtype=torch.float64))
    model(torch.randn(5, 8, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in trained(model))


def test_merge_unmerge_fold_and_export():
    model, x = make(), torch.randn(5, 8, dtype=torch.float64)
    expected, plain = model(x).detach(), merged_state_dict(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-12)
    with pytest.raises(RuntimeError, match="merged"):
        model(x)
    unmerge(model)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.allclose(model(x), expected, atol=1e-12)
    exported = Model().double()
    exported.load_state_dict(plain)
    assert torch.allclose(exported(x), expected, atol=1e-12)
    fold(model)
    assert torch.allclose(model(x), expected, atol=1e-12)


def test_adapter_files_fill_a_joint_model(tmp_path):
    model, other = make(), make()
    save_adapter(model, tmp_path, "base")
    with torch.no_grad():
        for parameter in trained(other):
            parameter.zero_()
    load_adapter(other, tmp_path)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.allclose(other(x), model(x), atol=1e-6)


def test_falls_back_where_one_product_would_not_be_the_same():
    model, x = make(dtype=torch.float32), torch.randn(5, 8)
    attention = model.audio_tower.self_attn
    with torch.autocast("cpu", torch.bfloat16):  # over an fp32 base
        assert torch.equal(model(x), attention.apart(x))
    assert attention.joint_projection.joined is None
    assert model(torch.randn(0, 8)).shape == (0, 16)
    for change in (
        lambda: setattr(attention.k_proj, "alpha", 1.0),
        lambda: setattr(attention.k_proj, "alpha", 2 * R) or attention.k_proj.base_layer.requires_grad_(True),
    ):
        change()
        assert torch.equal(model(x), attention.apart(x))
        assert attention.joint_projection.joined is None


def test_autocast_over_a_bf16_base_is_joint():
    model, x = make(dtype=torch.bfloat16), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert model.audio_tower.self_attn.joint_projection.joined is not None
    y.float().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained(model))
