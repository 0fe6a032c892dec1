import numpy as np
import torch

from bench.drawn import as_batch, dealt, draw, on_device
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


def test_parts_of_ranks_make_up_the_whole_and_keep_its_keys() -> None:
    whole = as_batch(draw(11, torch.Generator().manual_seed(4)), 0)
    parts = dealt(whole, 3)
    assert sorted(part.num_clips for part in parts) == [3, 4, 4]
    assert sorted(x for part in parts for x in part.clip_index_B) == list(range(11))
    assert sorted(x for part in parts for x in part.term_keys_N) == sorted(whole.term_keys_N)
    assert sum(len(part.pcm_S) for part in parts) == len(whole.pcm_S)
    assert sum(len(part.token_ids_P) for part in parts) == len(whole.token_ids_P)
    for part in parts:
        assert part.num_texts == part.num_clips
        for own, index in enumerate(part.clip_index_B):
            mine, theirs = (slice(*b.pos_indptr_B1[i : i + 2]) for b, i in ((part, own), (whole, index)))
            assert (
                part.term_keys_N[part.pos_terms[mine]].tolist() == whole.term_keys_N[whole.pos_terms[theirs]].tolist()
            )
            assert part.ign_groups[mine].tolist() == whole.ign_groups[theirs].tolist()
            assert part.text_keys_B[own] == whole.text_keys_B[index]
            assert part.token_lengths[own] == whole.token_lengths[index]
    most, least = (pick(sum(part.num_samples) for part in parts) for pick in (max, min))
    assert most < 1.25 * least
    assert dealt(whole, 1)[0].token_ids_P.tolist() == whole.token_ids_P.tolist()
