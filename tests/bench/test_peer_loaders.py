import itertools
import json

import numpy as np
import pytest
import torch

from bench.clip_set import make_clips
from bench.peer_loaders import PEERS, packed_batch
from data.clips import load_clips
from data.drops import DropLog
from data.settings import DataSettings
from model.tokenizer import ByteTokenizer


def test_a_packed_batch_holds_what_ours_holds():
    rows = [
        {"pcm": np.arange(3, dtype=np.int16).tobytes(), "text": "ab", "terms": json.dumps(["x", "y"])},
        {"pcm": np.arange(2, dtype=np.int16).tobytes(), "text": "c", "terms": json.dumps(["y"])},
    ]
    batch = packed_batch(rows, ByteTokenizer())
    assert batch["pcm"].tolist() == [0, 1, 2, 0, 1]
    assert batch["lengths"] == [2, 1, 1, 1]
    assert (batch["positives"].tolist(), batch["indptr"].tolist()) == ([0, 1, 1], [0, 2, 3])


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_yields_batches_epoch_after_epoch(name, tmp_path):
    clips = load_clips(make_clips(tmp_path / "loose", 12, 0.2), DataSettings(), DropLog())
    try:
        batches = PEERS[name](clips, tmp_path / "peer", 4, 0, ByteTokenizer())
        found = list(itertools.islice(batches, 5))
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")
    for batch in found:
        samples = batch["mel"] if "mel" in batch else batch["pcm"]
        assert torch.count_nonzero(samples)
