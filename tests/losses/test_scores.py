"""Scores handed over from outside give the loss and gradients that the products of the embeddings give."""

import torch

from losses.pairs import Pairs
from losses.relations import Relations
from losses.scores import TermScores, UnitRows
from losses.settings import LossSettings
from losses.sweep import LeftOut
from losses.terms import BankNegatives
from losses.total import Embeddings, total_loss
from tests.losses import cases


def test_unit_rows_score_as_products() -> None:
    audio_BE, cols_CE = cases.unit_rows(3, 5, 1), cases.unit_rows(4, 5, 2)
    rows = UnitRows(audio_BE)
    assert torch.equal(rows.against(cols_CE), audio_BE @ cols_CE.T)
    chosen_BH = torch.tensor([[0, 3], [1, 1], [2, 0]])
    assert torch.allclose(rows.against_own(cols_CE[chosen_BH]), (audio_BE @ cols_CE.T).gather(1, chosen_BH))


def test_given_scores_change_nothing_and_other_scores_change_the_loss() -> None:
    clips = cases.random_clips(3, 7)
    part = cases.batch_ids(clips, extra_terms=(14, 18))
    relations = Relations.build([part])
    local = relations.local()
    settings = LossSettings(no_term_loss_ratio=0.4, hard_neg_k=3, temperature=0.2)
    bank_KE = cases.unit_rows(6, 5, 9).detach()
    nothing = torch.zeros(0, dtype=torch.int64)
    bank = BankNegatives(bank_KE, LeftOut(Pairs(nothing, nothing), nothing))

    def loss_and_grads(given: bool, shift: float = 0.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
        leaves = cases.make_leaves(len(clips))
        term_NE = leaves.table_VE[relations.term_keys_N - 10]
        e = Embeddings(leaves.audio_GE, leaves.text_GE, term_NE, leaves.audio_GE, leaves.text_GE, term_NE)
        cosine_GN = leaves.audio_GE @ term_NE.T + shift * torch.arange(len(term_NE))
        scores = TermScores(cosine_GN, cosine_GN.T, UnitRows(leaves.audio_GE)) if given else None
        loss, _ = total_loss(e, local, leaves.inv_temperature, settings, bank, term_scores=scores)
        loss.backward()
        return loss.detach(), leaves.grads()

    loss, grads = loss_and_grads(given=False)
    same_loss, same_grads = loss_and_grads(given=True)
    assert abs(loss - same_loss) < 1e-14
    assert cases.largest_gap(grads, same_grads) < 1e-14
    assert abs(loss - loss_and_grads(given=True, shift=0.1)[0]) > 1e-3
