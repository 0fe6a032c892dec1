"""Each positive is in one bucket of each breakdown; a bucket's metrics are those of its positives alone."""

import pytest
import torch

from retrieval.breakdowns import breakdowns
from retrieval.judgements import Judgements
from retrieval.ranks import rank_positives

TERMS = ["pin", "voicemail", "pound key", "the conference call menu"]


def test_buckets_by_words_characters_and_training_clips() -> None:
    judgements = Judgements.from_terms(TERMS, [["pin", "voicemail"], ["pound key", TERMS[3]], ["pin"]])
    scores_CN = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.1, 0.2, 0.9, 0.0], [0.8, 0.1, 0.1, 0.9]])
    ranks = rank_positives(scores_CN, range(3), judgements)
    found = breakdowns(ranks, TERMS, {"pin": 3, "pound key": 250}, ks=(1, 2))
    assert {title: [b.name for b in buckets] for title, buckets in found.items()} == {
        "words": ["1", "2", "4+"],
        "characters": ["0-4", "8-11", "17+"],
        "training_clips": ["0", "2-4", "100-999"],
    }
    one_word = found["words"][0]
    assert (one_word.num_terms, one_word.metrics.num_positives, one_word.metrics.num_clips) == (2, 3, 2)
    # Clip 0: pin first, voicemail last of four. Clip 2: pin second.
    assert one_word.metrics.recall == {1: pytest.approx(0.25), 2: pytest.approx(0.75)}
    assert one_word.metrics.term_recall == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    for buckets in found.values():
        assert sum(bucket.metrics.num_positives for bucket in buckets) == 5
    assert "training_clips" not in breakdowns(ranks, TERMS)
    assert found["words"][0].to_json()["metrics"]["mrr"] == pytest.approx((1 + 1 / 2) / 2)
