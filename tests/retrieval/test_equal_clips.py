"""Clips of a prepared length give the embeddings that they give anywhere else."""

import numpy as np
import pytest
import torch

from model.packing import AudioPack
from retrieval.equal_clips import MAX_LAYOUTS, EqualClips
from retrieval.pcm import pack_waves
from retrieval.retriever import Retriever
from tests.retrieval.small_models import tone


@pytest.fixture
def windows() -> list[np.ndarray]:
    return [tone(300 + 100 * i, 0.5, seed=i) for i in range(5)]


def test_kept_tables_change_no_bit(retriever: Retriever, windows: list[np.ndarray]) -> None:
    equal = EqualClips(retriever.model)
    equal.prepare(8_000)
    for count in (1, 3, 5, 3, 1):
        expected = retriever.model.encode_audio(AudioPack(pack_waves(windows[:count]), [8_000] * count))
        assert torch.equal(equal.encode(windows[:count]), expected)


def test_only_prepared_lengths_are_known(retriever: Retriever, windows: list[np.ndarray]) -> None:
    equal = EqualClips(retriever.model)
    assert not equal.knows(windows)
    equal.prepare(8_000)
    assert equal.knows(windows)
    assert not equal.knows([*windows, tone(300, 0.6)])
    assert not equal.knows([tone(300, 0.6)])


def test_tables_are_bounded(retriever: Retriever) -> None:
    equal = EqualClips(retriever.model)
    equal.prepare(400)
    for count in range(1, MAX_LAYOUTS + 5):
        equal.encode([np.full(400, 7, np.int16)] * count)
    assert len(equal._layouts) == MAX_LAYOUTS


@pytest.fixture
def failing_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: torch.nn.Module, num_samples: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("retrieval.equal_clips._record", fail)


@pytest.mark.usefixtures("failing_graph")
def test_without_a_graph_windows_run_eagerly(
    retriever: Retriever, windows: list[np.ndarray], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = retriever.model.encode_audio(AudioPack(pack_waves(windows[:1]), [8_000]))
    equal = EqualClips(retriever.model)
    monkeypatch.setattr(type(retriever.model), "device", torch.device("cuda"))
    equal.prepare(8_000)
    monkeypatch.undo()
    assert "they run eagerly" in caplog.text
    assert torch.equal(equal.encode(windows[:1]), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_graph_gives_the_eager_embeddings(model_folder, windows: list[np.ndarray]) -> None:  # type: ignore[no-untyped-def]
    retriever = Retriever.load(model_folder, device="cuda")
    equal = EqualClips(retriever.model)
    equal.prepare(8_000)
    assert equal._alone[8_000] is not None
    for window in windows:
        eager = retriever.model.encode_audio(AudioPack(torch.from_numpy(window), [8_000]))
        torch.testing.assert_close(equal.encode([window]), eager, rtol=0, atol=1e-3)
