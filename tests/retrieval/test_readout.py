"""Both read-outs through one door, and the span of the window that wins."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.build import build_model
from model.maxsim import WindowShape
from model.packing import AudioPack
from model.settings import ModelSettings
from retrieval.evaluate import top_terms
from retrieval.index import Term, TermIndex
from retrieval.model_files import load_trained, save_model
from retrieval.readout import encode_clips, no_clips, score_clips, term_spans
from retrieval.retriever import Retriever
from tests.bin.tones import AUDIO, TEXT
from tests.retrieval.small_models import tone

SECONDS = (0.3, 1.2)


def build(tmp_path, readout):
    for name, config in (("audio", AUDIO), ("text", TEXT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    settings = ModelSettings(
        audio_model=str(tmp_path / "audio.json"), text_model=str(tmp_path / "text.json"), proj_dim=8, trainable="full",
        readout=readout,
    )  # fmt: skip
    return build_model(settings).model


def make_pack() -> AudioPack:
    lengths = [round(seconds * 16_000) for seconds in SECONDS]
    return AudioPack(torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1)) * 0.1, lengths)


@torch.no_grad()
def test_mean_scores_are_products(tmp_path) -> None:
    model = build(tmp_path, "mean")
    term_NE = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    clips = encode_clips(model, make_pack())
    assert torch.equal(clips, model.encode_audio(make_pack()))
    assert torch.equal(score_clips(clips, term_NE), clips @ term_NE.T)
    assert score_clips(no_clips(model), term_NE).shape == (0, 5)


@torch.no_grad()
def test_the_window_that_wins_tells_score_and_span(tmp_path) -> None:
    """The span's own audio frames, averaged by hand, have the score that the search reports."""
    model = build(tmp_path, "maxsim")
    term_NE = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    pack = make_pack()
    clips = encode_clips(model, pack)
    scores_CN = score_clips(clips, term_NE)
    scores, places = top_terms(clips, term_NE, 3, torch.arange(5).numpy())
    assert torch.equal(torch.from_numpy(scores), scores_CN.topk(3).values)
    spans = term_spans(model, clips, term_NE[torch.from_numpy(places)])
    frames_QD, layout = model._audio_frames(pack)
    starts = [0, *layout.lengths]
    for clip in range(2):
        for rank in range(3):
            start_s, end_s = spans[clip, rank].tolist()
            assert 0.0 <= start_s < end_s <= SECONDS[clip] + 0.02
            first, stop = round(start_s / 0.02), round(end_s / 0.02)
            assert stop - first in (2, 4, 8, 12, 16, 24)
            mean_D = frames_QD[starts[clip] + first : starts[clip] + stop].mean(0)
            score = torch.nn.functional.normalize(model.audio_head(mean_D), dim=0) @ term_NE[places[clip, rank]]
            assert abs(float(score) - float(scores[clip, rank])) < 1e-5
    # The mean over all frames is a different reading of the same clip.
    assert (score_clips(clips.audio_BE, term_NE) - scores_CN).abs().max() > 1e-2


@torch.no_grad()
def test_search_and_stream_tell_when_a_term_is_spoken(tmp_path) -> None:
    """A term whose embedding is that of one stretch of a clip is found just there, in the clip and in a stream."""
    settings = ModelSettings(
        audio_model=str(tmp_path / "audio.json"), text_model=str(tmp_path / "text.json"), proj_dim=8, trainable="full",
        readout="maxsim",
    )  # fmt: skip
    build(tmp_path, "maxsim")
    built = build_model(settings)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", built, settings, torch.tensor(2.5), {})
    retriever = Retriever.load(tmp_path / "model")
    assert retriever.model.windows == WindowShape((2, 4, 8, 12, 16, 24), 2)

    wave_S = np.concatenate([tone(300 + 60 * i, 0.08, seed=i) for i in range(24)])  # 1.92 s, no two stretches alike
    windows = retriever.model.encode_windows(AudioPack(torch.from_numpy(wave_S), [len(wave_S)]))
    firsts, sizes = windows.table.first_W, windows.table.size_W
    chosen = int(((firsts == 30) & (sizes == 8)).nonzero())
    other_E = torch.nn.functional.normalize(-windows.clips.window_WE.mean(0), dim=0)
    term_NE = torch.stack([other_E, windows.clips.window_WE[chosen]])
    retriever.use(TermIndex([Term("elsewhere", "Elsewhere"), Term("here", "Here")], term_NE, retriever.fingerprint))

    found = retriever.search(wave_S, k=2)
    assert [match.surface for match in found] == ["Here", "Elsewhere"]
    assert abs(found[0].score - 1) < 1e-5
    assert (round(found[0].start_s, 3), round(found[0].end_s, 3)) == (0.6, 0.76)
    several = retriever.search_many([wave_S[:16_000], wave_S, wave_S[:8_000]], k=1)
    assert several[1] == [found[0]] or abs(several[1][0].start_s - 0.6) < 1e-9

    stream = retriever.stream(window=1.92, hop=1.92, lookback=9.0, k=1)
    stream.accept(np.concatenate([np.zeros(len(wave_S), dtype=np.int16), wave_S]))
    (match,) = stream.query()
    assert match.surface == "Here"
    assert (round(match.start_s, 3), round(match.end_s, 3)) == (2.52, 2.68)


def test_a_model_is_not_filled_into_one_of_another_readout(tmp_path) -> None:
    paths = {f"{name}_model": str(tmp_path / f"{name}.json") for name in ("audio", "text")}
    build(tmp_path, "maxsim")
    settings = ModelSettings(**paths, proj_dim=8, trainable="full", readout="maxsim", maxsim_windows=(2, 9))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", build_model(settings), settings, torch.tensor(2.5), {})
    load_trained(tmp_path / "model", build_model(settings), settings)
    for changed in ({"readout": "mean"}, {"maxsim_windows": (2, 8)}, {"maxsim_stride": 1}):
        other = replace(settings, **changed)
        with pytest.raises(ValueError, match=f"{next(iter(changed))}: got"):
            load_trained(tmp_path / "model", build_model(other), other)
