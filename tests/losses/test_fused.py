"""The objective from pairs is the objective from masks: values and gradients, one process and several ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.pairs import Pairs
from losses.relations import Relations
from losses.settings import LossSettings
from losses.sweep import LeftOut
from losses.terms import BankNegatives
from losses.total import Embeddings, total_loss
from tests.losses import tiles

ALL_PARTS = LossSettings(no_term_loss_ratio=0.4, hard_neg_k=2)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), mined=st.booleans())
def test_shares_of_ranks_sum_to_the_dense_one_process_loss(cases, seed, counts, mined):
    num_clips = sum(counts)
    clips, extra = cases.random_clips(seed, num_clips), (11, 12) if mined else ()
    whole, split = cases.make_leaves(num_clips, seed), cases.make_leaves(num_clips, seed)
    ((loss, parts),) = cases.shares(clips, [num_clips], whole, ALL_PARTS, extra)
    loss.backward()
    results = cases.shares(clips, counts, split, ALL_PARTS, extra, tiled=True)
    torch.stack([share for share, _ in results]).sum().backward()
    assert abs(float((sum(share for share, _ in results) - loss).detach())) < 1e-12
    assert cases.largest_gap(split.grads(), whole.grads()) < 1e-11
    for name, value in parts.items():
        assert abs(float(sum(part[name] for _, part in results) - value)) < 1e-12, name


def test_every_share_hangs_on_every_gathered_tensor(cases):
    """A rank without clips or terms must still enter the backward pass of each gather, or the others wait for ever."""
    clips, leaves = cases.random_clips(3, 4), cases.make_leaves(4, 3)
    parts = [cases.batch_ids(clips), cases.batch_ids([])]
    local = Relations.build(parts).local_pairs(1)
    gathered = [leaves.audio_GE, leaves.text_GE, leaves.table_VE[parts[0].term_keys_N - 10]]
    embeddings = Embeddings(*(rows[:0] for rows in gathered), *gathered)
    loss, _ = total_loss(embeddings, local, leaves.inv_temperature, ALL_PARTS)
    grads = torch.autograd.grad(loss, [*gathered, leaves.inv_temperature])  # raises if one is not reached
    assert loss.item() == 0.0
    assert all(grad.abs().max() == 0 for grad in grads)


def both_ways(cases, bank, dtype=torch.float64, triton=False, device="cpu"):
    """(loss, gradients) from masks in fp64, then from pairs."""
    clips = cases.random_clips(8, 12)
    relations = Relations.build([cases.batch_ids(clips, (14, 18))])
    found = []
    for tiled in (False, True):
        leaves = cases.make_leaves(len(clips), 8, dim=7)
        if tiled:
            for name in ("audio_GE", "text_GE", "table_VE", "inv_temperature"):
                setattr(leaves, name, getattr(leaves, name).detach().to(dtype).to(device).requires_grad_())
        term_NE = leaves.table_VE[relations.term_keys_N.to(leaves.table_VE.device) - 10]
        e = Embeddings(leaves.audio_GE, leaves.text_GE, term_NE, leaves.audio_GE, leaves.text_GE, term_NE)
        local = relations.local_pairs(0, device) if tiled else relations.local()
        bank_here = bank(device) if tiled else bank("cpu")
        loss, _ = total_loss(e, local, leaves.inv_temperature, ALL_PARTS, bank_here, None, triton and tiled)
        loss.backward()
        found.append((loss.detach().double().cpu(), [g.double().cpu() for g in leaves.grads()]))
    return found


def bank_of(cases, device):
    left = LeftOut(Pairs(torch.tensor([0, 3]), torch.tensor([2, 5])).to(device), torch.tensor([4], device=device))
    return BankNegatives(cases.unit_rows(9, 7, 5).detach().to(device), left)


def test_with_a_bank(cases):
    (loss, grads), (tiled_loss, tiled_grads) = both_ways(cases, lambda device: bank_of(cases, device))
    assert abs(loss - tiled_loss) < 1e-12
    assert cases.largest_gap(grads, tiled_grads) < 1e-12
    without = both_ways(cases, lambda device: None)[1][0]
    assert abs(without - tiled_loss) > 1e-6


def test_by_kernels(cases):
    """The whole objective through Triton: fp32 embeddings, every part, a bank."""
    tiles.need_triton()

    def bank(device):
        made = bank_of(cases, device)
        return BankNegatives(made.embeddings_KE.float(), made.left_out)

    (loss, grads), (tiled_loss, tiled_grads) = both_ways(cases, bank, torch.float32, True, tiles.DEVICE)
    assert abs(loss - tiled_loss) < 1e-4
    assert cases.largest_gap(grads, tiled_grads) < 5e-3


@pytest.mark.parametrize("tiled", [False, True])
def test_share_of_a_rank_is_not_the_whole(cases, tiled):
    """What the sums above add up: each rank's own rows only."""
    clips, leaves = cases.random_clips(5, 6), cases.make_leaves(6, 5)
    shares = cases.shares(clips, [3, 3], leaves, ALL_PARTS, tiled=tiled)
    whole = cases.shares(clips, [6], leaves, ALL_PARTS, tiled=tiled)[0][0]
    assert all(float(share.detach()) < float(whole.detach()) for share, _ in shares)
