"""Products in fp8: how far off they are, their gradients, what the model keeps and what is refused."""

import copy

import pytest
import torch
from torch import nn

from lora.inject import inject_lora
from lora.merge import fold, merge, merged_state_dict
from lora.settings import LoraSettings
from model.build import build_model
from model.fp8 import (
    Fp8Linear,
    Fp8Product,
    check_widths,
    quantise_frozen,
    quantise_rows,
    shared_product,
    why_no_fp8,
)
from model.packing import TextPack
from model.settings import ModelSettings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_FP8 = why_no_fp8(DEVICE, torch.bfloat16) is None
# Without fp8, a GPU cannot run what is asked here; a CPU multiplies the same numbers in fp32.
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not HAS_FP8, reason="this GPU has no fp8 products")
TARGETS = LoraSettings().lora_targets
HALF_STEP = 2**-4
"""Of e4m3, relative: three bits behind the point."""


def draw(*shape):
    return torch.randn(*shape).to(DEVICE, torch.bfloat16)


def error(ours, truth):
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())


def make_linear(num_in, num_out, bias=True):
    return nn.Linear(num_in, num_out, bias).to(DEVICE, torch.bfloat16).requires_grad_(False)


def test_rows_come_back_within_half_a_step_whatever_their_scale():
    x = draw(5, 48) * torch.tensor([1e-20, 1e-3, 1.0, 1e4, 0.0], device=DEVICE).bfloat16()[:, None]
    quantised, scale = quantise_rows(x)
    assert (quantised.shape, scale.shape) == ((16, 48), (16, 1))
    assert (quantised.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    back = quantised.float() * scale
    assert torch.equal(back[4:], torch.zeros(12, 48, device=DEVICE)), "a row of zeros, and those filled up with"
    for row in range(4):
        truth = x[row].float()
        largest = float(truth.abs().max())
        assert ((back[row] - truth).abs() <= HALF_STEP * truth.abs() + largest / 448 * 2**-10).all()
        assert float(back[row].abs().max()) == pytest.approx(largest, rel=1e-6)


def test_nothing_hides_what_is_not_finite():
    x = torch.ones(2, 16, device=DEVICE, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    quantised, scale = quantise_rows(x)
    assert (quantised.float() * scale)[0, 3].isnan()
    assert (quantised.float() * scale)[1, 5].isnan()


@pytest.mark.parametrize("num_rows", [1, 5, 16, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_a_few_percent_off(num_rows, bias):
    torch.manual_seed(0)
    layer = make_linear(256, 96, bias)
    layer.weight.mul_(10 ** torch.linspace(-2, 2, 96, device=DEVICE)[:, None])  # no scale of one number would do
    exact = copy.deepcopy(layer).double()
    product = Fp8Product.of(layer.weight, layer.bias)
    x, grad = draw(num_rows, 256).requires_grad_(), draw(num_rows, 96)
    y = product(x)
    assert (y.dtype, y.shape) == (torch.bfloat16, (num_rows, 96))
    truth_x = x.detach().double().requires_grad_()
    truth = exact(truth_x)
    assert error(y, truth) < 0.05
    assert error(y[:, :8], truth[:, :8]) < 0.05, "small outputs have their own scale"
    ours, theirs = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(truth, truth_x, grad.double())[0]
    assert error(ours, theirs) < 0.05
    assert error(ours, theirs) > 1e-4, "then it was not fp8"


def test_leading_dimensions_and_no_rows():
    product = Fp8Product.of(make_linear(32, 48).weight, None)
    assert product(draw(2, 3, 32)).shape == (2, 3, 48)
    nothing = draw(0, 32).requires_grad_()
    y = product(nothing)
    assert y.shape == (0, 48)
    assert torch.autograd.grad(y.sum(), nothing)[0].shape == (0, 32)


def test_nothing_of_the_input_is_kept_and_both_copies_weigh_what_one_did():
    layer, kept = make_linear(32, 64), []
    product = Fp8Product.of(layer.weight, layer.bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product(draw(4, 32).requires_grad_())
    assert not kept
    copies = (product.weight_OI, product.weight_IO)
    assert sum(t.numel() * t.element_size() for t in copies) == layer.weight.numel() * 2


def test_parts_of_a_joint_product_equal_the_whole():
    torch.manual_seed(1)
    product = Fp8Product.of(torch.cat([draw(32, 64), draw(16, 64)]), draw(48))
    first, second = Fp8Linear(product, 0, 32, True), Fp8Linear(product, 32, 48, False)
    assert shared_product(first, second) is product
    assert shared_product(first, make_linear(64, 16)) is None
    assert shared_product(first, Fp8Linear(Fp8Product.of(draw(16, 64), None), 0, 16, False)) is None
    assert (first.out_features, first.in_features, second.bias) == (32, 64, None)
    x = draw(7, 64).requires_grad_()
    y, parts = product(x), [first(x), second(x)]
    torch.testing.assert_close(torch.cat(parts, dim=1), y)
    grad = draw(7, 48)
    whole, apart = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(parts, x, grad.split((32, 16), 1))[0]
    assert error(apart, whole) < 0.05


@pytest.fixture
def settings(architecture_files):
    return ModelSettings(
        audio_model=architecture_files[0], text_model=architecture_files[1], base_dtype="bf16", proj_dim=16
    )


def embed(model, make_pack):
    with torch.no_grad():
        return model.encode_audio(make_pack([0.3, 0.5, 0.2]))


def adapted(settings, quantised, targets=TARGETS, **lora):
    torch.manual_seed(0)
    model = build_model(settings, DEVICE, torch.bfloat16).model
    if quantised:
        quantise_frozen(model, least_adapted_width=0)
    torch.manual_seed(1)
    inject_lora(model, LoraSettings(4, 8, 0.0, targets, **lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("every", [True, False])
def test_a_model_keeps_its_embeddings_and_its_adapters_learn_alike(settings, make_pack, joint, every):
    more = ("*.fc1", "*.gate_proj", "*.o_proj") if every else ()
    models = [adapted(settings, q, (*TARGETS, *more), lora_joint=joint) for q in (False, True)]
    grads, embedded = [], []
    for model in models:
        embedded.append(embed(model, make_pack))
        model.train()
        audio_BE = model.encode_audio(make_pack([0.3, 0.5, 0.2]))
        (audio_BE * torch.linspace(-1, 1, 16, device=DEVICE)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None]))
    assert torch.cosine_similarity(*embedded).min() > 0.99
    assert error(*embedded) > 1e-4, "then it was not fp8"
    assert torch.cosine_similarity(grads[1], grads[0], dim=0) > 0.98
    names = [sorted(n for n, p in m.named_parameters() if p.requires_grad) for m in models]
    assert names[0] == names[1]


def test_the_text_side_and_what_is_converted(settings):
    models = [adapted(settings, q) for q in (False, True)]
    layer = models[1].language_model.layers[0]
    assert layer.self_attn.q_proj.base_layer.product is layer.self_attn.v_proj.base_layer.product
    assert shared_product(layer.mlp.gate_proj, layer.mlp.up_proj) is not None
    pack = TextPack(torch.tensor([1, 2, 3, 4, 5]), [3, 2])
    with torch.no_grad():
        ours, theirs = (model.encode_text(pack) for model in models)
    assert torch.cosine_similarity(ours, theirs).min() > 0.99
    kinds = {type(m) for n, m in models[1].named_modules() if n.endswith(("out_proj", "fc1", "fc2", "down_proj"))}
    assert kinds == {Fp8Linear}
    narrow = build_model(settings, DEVICE, torch.bfloat16).model
    assert quantise_frozen(narrow) > 0
    assert type(narrow.language_model.layers[0].self_attn.q_proj) is nn.Linear, "narrower than pays"


def test_adapters_alone_beside_the_product_equal_the_layers_one_by_one(settings):
    """The joint node against base layer and adapter apart: the same fp8 product, so only bf16 roundings differ."""
    attention = adapted(settings, True).train().language_model.layers[0].self_attn
    x = draw(6, attention.q_proj.in_features).requires_grad_()
    masters = [m for p in (attention.q_proj, attention.k_proj, attention.v_proj) for m in (p.lora_A, p.lora_B)]
    y = attention.joint_projection(x)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    whole = layers[0].base_layer.product(x)
    low = [((x.float() @ p.lora_A.T) @ p.lora_B.T) * p.scaling for p in layers]
    apart = whole + torch.cat(low, dim=1)
    assert error(y, apart) < 2**-7
    grad = draw(*y.shape)
    ours = torch.autograd.grad(y, (x, *masters), grad)
    theirs = torch.autograd.grad(apart, (x, *masters), grad.float())
    for mine, truth in zip(ours, theirs, strict=True):
        assert error(mine, truth) < 2**-6


def test_what_cannot_be_merged_is_refused(settings):
    model = adapted(settings, True)
    for function in (merge, fold, merged_state_dict):
        with pytest.raises(
            ValueError, match=r"base_dtype: the weight under .* fp8 .* open the model with base_dtype bf16"
        ):
            function(model)


def test_what_cannot_run_is_refused(settings, monkeypatch):
    settings.base_dtype = "fp8"
    with pytest.raises(ValueError, match="base_dtype: got 'fp8', which cannot run here: needs a CUDA device, not cpu"):
        build_model(settings, "cpu", torch.bfloat16)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    assert "8.9 (Ada, Hopper) or more; A100 has 8.0" in why_no_fp8(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "bf16, not torch.float32" in why_no_fp8(cuda, torch.float32)
    assert why_no_fp8(cuda, torch.bfloat16) is None
    settings.trainable = "full"
    with pytest.raises(ValueError, match="base_dtype: got 'fp8' with trainable='full'"):
        build_model(settings, "cpu")


def test_widths_that_fp8_cannot_take_are_named():
    model = nn.Module()
    model.audio_tower = nn.Module()
    model.audio_tower.layer = nn.Module()
    model.audio_tower.layer.fc1 = nn.Linear(24, 32)
    with pytest.raises(ValueError, match=r"audio_tower\.layer has a layer of width 24; widths must be multiples of 16"):
        check_widths(model)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a CUDA device")
def test_both_ways_replay_as_a_cuda_graph():
    torch.manual_seed(2)
    product = Fp8Product.of(make_linear(1280, 5120).weight, draw(5120))
    x, grad = draw(37, 1280), draw(37, 5120)
    product.input_gradient(product.forward(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, back = product.forward(x), product.input_gradient(grad)
    x.copy_(draw(37, 1280) * 100)
    grad.copy_(draw(37, 5120) * 1e-4)
    graph.replay()
    assert torch.equal(y, product.forward(x))
    assert torch.equal(back, product.input_gradient(grad))
