import numpy as np
import torch

from bench.drawn import as_batch, draw, on_device
from bin.step import batch_ids
from losses.relations import Relations


def test_the_same_generator_draws_the_same_clips() -> None:
    one, other = (draw(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.waves, other.waves, strict=True))
    assert torch.equal(one.term_lengths_N, other.term_lengths_N)


def test_clips_are_spread_as_users_have_them() -> None:
    drawn = draw(400, torch.Generator().manual_seed(0))
    seconds = np.array([len(wave) for wave in drawn.waves]) / 16_000
    assert 0.3 <= seconds.min() < seconds.max() <= 4.0
    assert abs(np.median(seconds) - 1.5) < 0.15
    assert 2 <= int(drawn.text_lengths_B.min()) <= int(drawn.text_lengths_B.max()) <= 16
    assert 1.2 < float(drawn.num_terms_B.float().mean()) < 1.4
    assert set(drawn.term_lengths_N.tolist()) == {2, 3, 4, 5}


def test_a_batch_of_them_is_one_that_the_losses_take() -> None:
    drawn = draw(6, torch.Generator().manual_seed(1))
    fed = on_device(as_batch(drawn, 7, vocabulary=50), torch.device("cpu"))
    relations = Relations.build([batch_ids(fed.batch)])
    assert relations.num_clips == 6
    assert relations.num_terms == len(drawn.term_lengths_N)
    assert torch.equal(relations.positives_GN.sum(1), drawn.num_terms_B)
    assert len(set(relations.text_keys_G.tolist())) == 6
    assert fed.audio.pcm_S.dtype == torch.int16
    assert int(fed.text.ids_P.max()) < 50
    assert drawn.num_text_tokens == len(fed.batch.token_ids_P)
    assert len(fed.batch.token_lengths) == 6 + relations.num_terms
