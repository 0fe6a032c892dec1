"""The setting `kernels`: what each name means where, and what is said about it."""

import importlib.util
import logging

import pytest
import torch

from lora.inject import inject_lora, lora_parameters
from lora.settings import LoraSettings
from model.build import build_model
from model.kernels import resolve_kernels, uses_triton
from model.packing import TextPack
from model.settings import ModelSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    resolve_kernels.cache_clear()
    yield
    resolve_kernels.cache_clear()


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


def test_auto_on_the_cpu_is_torch_and_says_why_once(caplog):
    caplog.set_level(logging.INFO, "model.kernels")
    assert not any(uses_triton("auto", torch.zeros(1)) for _ in range(3))
    assert len(caplog.messages) == 1
    assert "torch" in caplog.messages[0]


def test_auto_on_a_gpu_is_triton_where_it_runs(monkeypatch, ampere):
    assert resolve_kernels("auto", CUDA, torch.bfloat16) == "triton"
    assert resolve_kernels("torch", CUDA, torch.bfloat16) == "torch"
    assert resolve_kernels("auto", CUDA, torch.float64) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"kernels: got 'triton'.*Ampere.*use auto or torch"):
        resolve_kernels("triton", CUDA, torch.bfloat16)


def test_without_triton_auto_falls_back_and_triton_is_refused(monkeypatch, ampere):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert resolve_kernels("auto", CUDA, torch.bfloat16) == "torch"
    with pytest.raises(ValueError, match="triton is not installed"):
        resolve_kernels("triton", CUDA, torch.bfloat16)


def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch, ampere):
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        resolve_kernels("triton", CPU, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_kernels("triton", CPU, torch.float32) == "triton"
    assert resolve_kernels("auto", CPU, torch.float32) == "torch"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="kernels: got 'cuda', allowed are auto, triton, torch"):
        resolve_kernels("cuda", CPU, torch.float32)


@pytest.mark.parametrize("readout", ["tower", "lm"])
@pytest.mark.parametrize("num_checkpointed", [0, 1])
def test_a_model_gives_the_same_with_kernels_and_with_torch(
    monkeypatch, readout, num_checkpointed, write_qwen2_audio, make_pack
):
    """Embeddings and adapters' gradients of both towers, clips of odd and even length and of a single token."""
    pytest.importorskip("triton", reason="compares with the Triton kernels")
    # By default cuDNN's fp32 convolutions take tf32, unlike the products that stand for them here.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    folder, pack = str(write_qwen2_audio("v4")), make_pack([0.01, 0.07, 0.1])
    text_pack = TextPack(torch.arange(9), [3, 1, 5])
    results = []
    for kernels in ("triton", "torch"):
        settings = ModelSettings(model_name=folder, audio_readout=readout, kernels=kernels, base_dtype="fp32")
        model = build_model(settings, DEVICE, torch.float32).model.train()
        for tower in (model.audio_tower, model.language_model):
            tower.num_checkpointed = num_checkpointed
        torch.manual_seed(0)
        inject_lora(model, LoraSettings(lora_r=2, lora_dropout=0.0))
        torch.manual_seed(1)
        for _, parameter in lora_parameters(model):
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        torch.manual_seed(2)
        for head in (model.audio_head, model.text_head):
            head.reset_parameters()
        audio_BE, text_NE = model.encode_audio(pack), model.encode_text(text_pack)
        trained = dict(lora_parameters(model))
        grads = torch.autograd.grad((audio_BE @ text_NE.T).diagonal().sum(), list(trained.values()))
        results.append((audio_BE, text_NE, *grads))
    assert len(results[0]) == 2 + 2 * 2 * 2 * 3
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-5)
