from pathlib import Path

import numpy as np
import pytest
import torch

from bin.feed import FedBatch, feed, pinning
from data.clips import load_clips
from data.drops import DropLog
from data.loader import Loader
from data.settings import DataSettings
from model.tokenizer import ByteTokenizer

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def loader(tones: Path, num_workers: int, device: str) -> Loader:
    clips = load_clips(tones / "train.json", DataSettings(), DropLog())
    settings = DataSettings(num_workers=num_workers)
    return Loader(clips, 4, ByteTokenizer(), settings, pin=pinning(torch.device(device)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_device_gets_the_loaders_batches_in_order(tones: Path, num_workers: int, device: str) -> None:
    expected = list(loader(tones, 0, "cpu").epoch(1, 2))
    fed = list(feed(loader(tones, num_workers, device), 1, 2, torch.device(device)))
    assert [one.batch.clip_ids for one in fed] == [batch.clip_ids for batch in expected]
    for one, batch in zip(fed, expected, strict=True):
        assert one.audio.pcm_S.device.type == one.text.ids_P.device.type == device
        np.testing.assert_array_equal(one.audio.pcm_S.cpu().numpy(), batch.pcm_S)
        np.testing.assert_array_equal(one.text.ids_P.cpu().numpy(), batch.token_ids_P)


def test_on_the_cpu_the_packs_are_views_of_the_loaders_memory(tones: Path) -> None:
    one = next(feed(loader(tones, 1, "cpu"), 0, 0, torch.device("cpu")))
    assert one.audio.pcm_S.data_ptr() == one.batch.pcm_S.ctypes.data
    assert pinning(torch.device("cpu")) is None


def test_a_side_with_nothing_in_it_has_no_pack(tones: Path) -> None:
    batch = next(loader(tones, 0, "cpu").epoch(0))
    batch.token_lengths, batch.token_ids_P = [], batch.token_ids_P[:0]
    assert FedBatch.of(batch).text is None
