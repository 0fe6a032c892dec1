"""One call site, several kernels, one result."""

import logging

import pytest
import torch

from model import attention
from model.attention import Heads, packed_attention, resolve_backend
from model.packing import SequenceLayout


def reference(q_PHD, k_PKD, v_PKD, lengths, causal):
    """Softmax attention written out, one sequence at a time."""
    group = q_PHD.shape[1] // k_PKD.shape[1]
    out = []
    for q, k, v in zip(*(x.split(lengths) for x in (q_PHD, k_PKD, v_PKD)), strict=True):
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(len(q), len(q), device=q.device).triu(1).bool(), float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(out)


def attend(q_PHD, k_PKD, v_PKD, layout, causal, backend="auto"):
    """The call site, from the three parts side by side."""
    qkv_PJ = torch.cat([x.flatten(1) for x in (q_PHD, k_PKD, v_PKD)], dim=1)
    heads = Heads(q_PHD.shape[1], k_PKD.shape[1], q_PHD.shape[2])
    return packed_attention(qkv_PJ, heads, layout, causal, backend=backend).unflatten(1, (-1, heads.head_dim))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[7, 1, 12, 3], [5, 5, 5], [1], [9, 8], [2, 60, 1, 3, 4, 4, 25, 2]])
def test_sdpa_equals_the_formula_in_values_and_gradients(lengths, kv_heads, causal):
    shapes = [(sum(lengths), heads, 6) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    layout = SequenceLayout.build(lengths, "cpu")
    ours, theirs = attend(*inputs, layout, causal), reference(*inputs, lengths, causal)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tile", "flash", "varlen"])
def test_an_asked_for_backend_that_cannot_run_is_an_error(name):
    with pytest.raises(ValueError, match=f"attention: got '{name}', which cannot run here"):
        resolve_backend(name, torch.device("cpu"), torch.float32)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="allowed are auto, tile, flash, varlen, sdpa"):
        resolve_backend("eager", torch.device("cpu"), torch.float32)


def test_a_missing_triton_is_told(monkeypatch):
    monkeypatch.setattr(attention, "tile_attention", None)
    resolve_backend.cache_clear()
    with pytest.raises(ValueError, match="'tile', which cannot run here: triton is not installed; use auto or sdpa"):
        resolve_backend("tile", torch.device("cpu"), torch.bfloat16)
    resolve_backend.cache_clear()


@pytest.mark.parametrize(("is_short", "chosen"), [(True, "tile"), (False, "flash")])
def test_auto_takes_tiles_for_short_sequences(is_short, chosen, monkeypatch):
    monkeypatch.setattr(attention, "_why_not", lambda *_: None)
    resolve_backend.cache_clear()
    assert resolve_backend("auto", torch.device("cuda"), torch.bfloat16, 64, is_short) == chosen
    resolve_backend.cache_clear()


def test_auto_tells_once_what_it_took(caplog):
    resolve_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert resolve_backend("auto", torch.device("cpu"), torch.float32) == "sdpa"
    assert len(caplog.records) == 1
    assert "sdpa" in caplog.text


@pytest.mark.parametrize("signature", ["2.10", "2.11", "2.13"])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_signature_moved(signature, causal, monkeypatch):
    """`is_causal` in 2.10, `window_size` from 2.11, `enable_gqa` later: each is called the way it wants."""
    calls = []

    def old(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        calls.append((k.shape[1], is_causal))
        return q

    def middle(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        calls.append((k.shape[1], window_size == (-1, 0)))
        return q

    def new(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        calls.append((k.shape[1] * 2, window_size == (-1, 0)))
        return q

    kernel, names = {
        "2.10": (old, {"is_causal"}),
        "2.11": (middle, {"window_size"}),
        "2.13": (new, {"window_size", "enable_gqa"}),
    }[signature]
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_VARLEN_PARAMETERS", frozenset(names))
    q, kv = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    attention._varlen(q, kv, kv, SequenceLayout.build([2, 3], "cpu"), causal)
    assert calls == [(4, causal)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", ["tile", "flash", "varlen"])
def test_kernels_agree_on_the_gpu(backend, kv_heads, causal):
    lengths = [7, 130, 1, 64]
    if backend == "flash" and attention.flash_attn_varlen_func is None:
        pytest.skip("flash_attn is not installed")
    shapes = [(sum(lengths), heads, 64) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    layout = SequenceLayout.build(lengths, "cuda")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = reference(*wide, lengths, causal)
    weights = torch.randn_like(exact)
    exact_grads = torch.autograd.grad((exact * weights).sum(), wide)
    for name in (backend, "sdpa"):
        ours = attend(*inputs, layout, causal, name)
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=2e-2)
        grads = torch.autograd.grad((ours * weights.to(ours.dtype)).sum(), inputs)
        for a, b in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=5e-2, atol=5e-2)
