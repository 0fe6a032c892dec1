"""Attention over tiles against the formula written out: in Triton's interpreter where there is no GPU, else on it."""

import pytest
import torch

from model.attention import Heads, packed_attention
from model.packing import SequenceLayout
from model.rotary import Rotary

triton = pytest.importorskip("triton", reason="the kernels need triton")
from model.tile_attention import NARROW, WIDE, WIDE_AMPERE, Tiling, Tilings, tile_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreter_takes_loaded_bounds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tilings(Tiling(16, 16, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 4, 1))
# One token alone, many in a tile, one across three tiles, one that ends with its tile.
LENGTHS = [3, 1, 12, 35, 1, 12]


def reference(qkv_PJ, heads, lengths, causal, rotary):
    """Softmax attention, one sequence at a time, in the dtype of the input."""
    out = []
    for rows in qkv_PJ.split(lengths):
        layout = SequenceLayout.build([len(rows)], rows.device)
        q, k, v = heads.split(rows)
        if rotary is not None:
            q, k = rotary.turn(q, layout), rotary.turn(k, layout)
        group = heads.num_heads // heads.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / heads.head_dim**0.5
        if causal:
            scores = scores.masked_fill(scores.new_ones(len(q), len(q)).triu(1).bool(), float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    return torch.cat(out)


def compare(lengths, heads, causal, turned, dtype, tilings, layout=None):
    """The largest differences of values and of gradients, each over the largest element of what is right."""
    torch.manual_seed(0)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv_PJ = torch.randn(sum(lengths), width, device=DEVICE).to(dtype).requires_grad_()
    wide_PJ = qkv_PJ.detach().double().requires_grad_()
    rotary = Rotary.build(1e4, heads.head_dim, max(lengths), dtype, torch.device(DEVICE)) if turned else None
    exact = None if rotary is None else Rotary(rotary.cos_LD.double(), rotary.sin_LD.double())
    layout = layout or SequenceLayout.build(lengths, DEVICE)
    ours = tile_attention(qkv_PJ, heads.num_heads, heads.num_kv_heads, layout, causal, rotary, tilings)
    theirs = reference(wide_PJ, heads, lengths, causal, exact)
    dout = torch.randn_like(ours)
    (grad,) = torch.autograd.grad(ours, qkv_PJ, dout)
    (exact_grad,) = torch.autograd.grad(theirs, wide_PJ, dout.double())
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in ((ours, theirs), (grad, exact_grad))]


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients(causal, turned):
    errors = compare(LENGTHS, Heads(1, 1, 32), causal, turned, torch.float32, SMALL)
    assert max(errors) < 2e-6


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries(kv_heads):
    assert max(compare(LENGTHS, Heads(4, kv_heads, 32), True, True, torch.float32, SMALL)) < 2e-6


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_head_sizes_that_are_no_power_of_two(head_dim):
    assert max(compare([5, 19], Heads(1, 1, head_dim), True, True, torch.float32, SMALL)) < 2e-6


@pytest.mark.parametrize("tilings", [NARROW, WIDE, WIDE_AMPERE])
def test_the_tilings_of_every_day(tilings):
    errors = compare([70, 1, 2, 3, 65], Heads(1, 1, 32), False, False, torch.float32, tilings)
    assert max(errors) < 2e-6


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_query_heads_that_share_key_heads(causal, turned):
    assert max(compare(LENGTHS, Heads(4, 2, 32), causal, turned, torch.float32, SMALL)) < 2e-6


def test_half_precision():
    assert max(compare(LENGTHS, Heads(2, 1, 32), True, True, torch.float16, SMALL)) < 2e-3


@pytest.mark.parametrize("causal", [True, False])
def test_empty_sequences_at_the_end(causal):
    """A captured graph keeps room for more sequences than a batch has."""
    full = SequenceLayout.build([4, 13], DEVICE)
    cu = torch.cat((full.cu_seqlens, full.cu_seqlens[-1:].expand(3)))
    layout = SequenceLayout(full.lengths, full.max_len, cu, full.owner_P, full.place_P)
    assert max(compare([4, 13], Heads(1, 1, 16), causal, True, torch.float32, SMALL, layout=layout)) < 2e-6


def test_a_strided_view_is_read_in_place():
    heads, layout = Heads(2, 1, 16), SequenceLayout.build([3, 18], DEVICE)
    wide = torch.randn(21, 80, device=DEVICE)
    ours = tile_attention(wide[:, 8:72], 2, 1, layout, True, None, SMALL)
    torch.testing.assert_close(ours, packed_attention(wide[:, 8:72], heads, layout, True, backend="sdpa"))


def test_no_gradient_where_none_is_asked_for():
    layout = SequenceLayout.build([3], DEVICE)
    assert not tile_attention(torch.randn(3, 48, device=DEVICE), 1, 1, layout, True, None, SMALL).requires_grad


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(64, 4), (128, 4), (128, 2), (80, 1), (32, 4)])
def test_tensor_cores(head_dim, kv_heads, causal, dtype):
    lengths = [7, 130, 1, 64, 2, 2, 2, 700, 5]
    errors = compare(lengths, Heads(4, kv_heads, head_dim), causal, True, dtype, None)
    assert max(errors) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@needs_gpu
def test_no_worse_than_the_plain_path_and_repeatable():
    """Rotary positions in fp32: closer to fp64 than sdpa on bf16 products; two runs give the same bits."""
    heads, lengths = Heads(8, 8, 128), [4, 9, 2, 16, 3] * 20
    layout = SequenceLayout.build(lengths, "cuda")
    qkv_PJ = torch.randn(sum(lengths), 3 * 8 * 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rotary = Rotary.build(1e4, 128, 16, torch.bfloat16, torch.device("cuda"))
    exact = reference(
        qkv_PJ.detach().double(), heads, lengths, True, Rotary(rotary.cos_LD.double(), rotary.sin_LD.double())
    )
    runs = [packed_attention(qkv_PJ, heads, layout, True, rotary, "tile") for _ in range(2)]
    plain = packed_attention(qkv_PJ, heads, layout, True, rotary, "sdpa")
    assert (runs[0] - exact).square().mean() <= (plain - exact).square().mean()
    grads = [torch.autograd.grad(run, qkv_PJ, torch.ones_like(run))[0] for run in runs]
    assert torch.equal(*runs)
    assert torch.equal(*grads)


@needs_gpu
@pytest.mark.parametrize("causal", [True, False])
def test_a_graph_replays_with_other_lengths(causal):
    """The grid depends on the number of rows alone; new tables are copied into the captured ones."""
    heads = Heads(4, 4, 64)
    layout = SequenceLayout.build([10, 20, 34], "cuda")
    qkv_PJ = torch.randn(64, 3 * 4 * 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(64, 4 * 64, device="cuda", dtype=torch.bfloat16)

    def step(layout):
        out = packed_attention(qkv_PJ, heads, layout, causal, None, "tile")
        return out, *torch.autograd.grad(out, qkv_PJ, dout)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(layout)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layout)
    other = SequenceLayout.build([31, 2, 31], "cuda")
    for name in ("cu_seqlens", "owner_P", "place_P"):
        getattr(layout, name).copy_(getattr(other, name))
    graph.replay()
    for ours, fresh in zip(captured, step(other), strict=True):
        assert torch.equal(ours, fresh)
