"""The benchmark of the sweep runs, and refuses to time what finds something else."""

import pytest
import torch

from bench.bank import BF16_PRODUCTS, TINY, check_parity, clear_of_limit, dense, measure, problem, swept
from bench.limits import measure_limits
from losses.pairs import Pairs
from losses.sweep import LeftOut


def test_it_runs_at_a_small_size():
    found = measure(measure_limits(tiny=True), tiny=True)
    assert [row["way"] for row in found.rows] == ["ours", "dense", "dense bf16"]
    assert len(found.checks) == 1


def test_other_results_are_noticed_and_clips_at_their_limit_left_alone():
    same, every = (torch.ones(10), torch.ones(10, 4), torch.ones(10, 2)), torch.ones(10, dtype=torch.bool)
    for place, name in enumerate(("lse", "gradient", "top")):
        other = [x.clone() for x in same]
        other[place][0] = torch.tensor([0.0, 1, 1, 1]) if name == "gradient" else 0.0
        with pytest.raises(RuntimeError, match="parity with peer"):
            check_parity(same, tuple(other), every, BF16_PRODUCTS, "peer")
        check_parity(same, tuple(other), torch.arange(10) > 0, BF16_PRODUCTS, "peer")
    with pytest.raises(RuntimeError, match=r"on 80\.0% of the clips"):
        check_parity(same, same, torch.arange(10) > 1, BF16_PRODUCTS, "peer")


def test_every_rule_of_the_problem_matters():
    """Without the limit, the names, or what is left out for all, parity fails."""
    p, inv_t = problem(*TINY, torch.device("cpu")), torch.tensor(14.0)
    clear_M = clear_of_limit(p.audio_ME, p.bank_KE, p.limit_M)
    right = dense(p.bank_KE, p.left_out, p.limit_M, inv_t, torch.float32)(p.audio_ME)
    ours = swept(p.bank_KE, p.left_out, p.limit_M, inv_t, False)(p.audio_ME)
    check_parity(ours, right, clear_M, BF16_PRODUCTS, "dense")
    pairs_Q, entry_J = p.left_out.pairs_Q, p.left_out.entry_J
    no_names = LeftOut(Pairs(pairs_Q.row_P[:0], pairs_Q.col_P[:0]), entry_J)
    for left_out, limit_M in (
        (p.left_out, p.limit_M + 1),
        (no_names, p.limit_M),
        (LeftOut(pairs_Q, entry_J[:0]), p.limit_M),
    ):
        wrong = swept(p.bank_KE, left_out, limit_M, inv_t, False)(p.audio_ME)
        with pytest.raises(RuntimeError, match="parity with dense"):
            check_parity(wrong, right, clear_M, BF16_PRODUCTS, "dense")


def test_a_cosine_at_the_limit_is_seen():
    audio_ME, bank_KE = torch.eye(2), torch.tensor([[0.5, 0.0], [0.1, 0.3]])
    assert clear_of_limit(audio_ME, bank_KE, torch.tensor([0.5, 0.5])).tolist() == [False, True]
