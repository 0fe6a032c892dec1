"""Both encoders: gradients reach what trains, dropout is replayed, embeddings are unit vectors."""

import pytest
import torch
from torch import nn

from model.build import build_model
from model.packing import AudioPack, TextPack
from model.settings import ModelSettings


class Adapter(nn.Module):
    """Adds a trainable low-rank path beside a frozen linear, as an adapter does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def inject(model: nn.Module) -> dict[str, nn.Parameter]:
    for path, module in list(model.named_modules()):
        if path.endswith(("q_proj", "k_proj", "v_proj")):
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Adapter(module))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def text_pack():
    return TextPack(torch.randint(0, 257, (20,)), [5, 1, 14])


@pytest.mark.parametrize("readout", ["tower", "lm"])
def test_checkpointing_behind_a_frozen_input_gives_every_gradient(readout, write_qwen2_audio, make_pack, text_pack):
    """Reentrant checkpointing with an input that needs no gradient gave 0 of 384 adapter tensors one, silently."""
    folder, pack = str(write_qwen2_audio("v4")), make_pack([0.3, 0.1, 0.25])
    grads = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        settings = ModelSettings(model_name=folder, audio_readout=readout, checkpointing=checkpointing)
        model = build_model(settings, "cpu", torch.float64).model.train()
        trained = inject(model)
        assert len(trained) == 2 * 2 * 2 * 3 + 4
        scores = model.encode_audio(pack) @ model.encode_text(text_pack).T
        (scores * torch.arange(9).view(3, 3)).sum().backward()
        assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        grads[checkpointing] = {name: p.grad for name, p in trained.items()}
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, rtol=1e-12, atol=1e-14)


def test_every_parameter_of_a_full_model_gets_a_gradient(architecture_files, make_pack, text_pack):
    settings = ModelSettings(audio_model=architecture_files[0], text_model=architecture_files[1], trainable="full")
    model = build_model(settings).model.train()
    scores = model.encode_audio(make_pack([0.3, 0.1, 0.25])) @ model.encode_text(text_pack).T
    (scores * torch.arange(9).view(3, 3)).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]


def test_autocast_is_opened_by_the_model_itself(architecture_files, make_pack, text_pack):
    settings = ModelSettings(audio_model=architecture_files[0], text_model=architecture_files[1], trainable="full")
    model = build_model(settings, "cpu", torch.bfloat16).model.train()
    seen = []
    model.language_model.layers[0].register_forward_hook(lambda _, __, out: seen.extend(part.dtype for part in out))
    text_NE = model.encode_text(text_pack)
    assert seen == [torch.bfloat16] * 2
    assert text_NE.dtype == torch.float32
    torch.testing.assert_close(text_NE.norm(dim=-1), torch.ones(3))
    (text_NE.sum() + model.encode_audio(make_pack([0.1])).sum()).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_for_training_only_and_follows_the_rng(checkpointing, architecture_files, make_pack, text_pack):
    settings = ModelSettings(
        audio_model=architecture_files[0],
        text_model=architecture_files[1],
        trainable="full",
        tower_dropout=0.3,
        checkpointing=checkpointing,
    )
    model = build_model(settings).model
    assert torch.equal(model.encode_text(text_pack), model.encode_text(text_pack))
    model.train()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        out = model.encode_text(text_pack)
        (out.sum() + model.encode_audio(make_pack([0.1])).sum()).backward()
        runs.append((out.detach(), model.language_model.layers[0].mlp.up_proj.weight.grad.clone()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_ten_milliseconds_of_silence_is_finite(write_qwen2_audio):
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4")), audio_readout="lm")).model.train()
    audio_BE = model.encode_audio(AudioPack(torch.zeros(160 + 1600, dtype=torch.int16), [160, 1600]))
    audio_BE.sum().backward()
    assert audio_BE.isfinite().all()
    assert model.audio_head.weight.grad.isfinite().all()
