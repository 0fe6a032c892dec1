"""The packed log-mel against transformers' extractor (fp32) and against Whisper's formula on 30 s (fp64)."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank as hf_mel_filter_bank

from model.logmel import LogMel, mel_filter_bank
from model.packing import AudioLayout, AudioPack

LENGTHS_S = [0.01, 0.03, 1.0, 1.2345, 29.98, 29.99, 30.0]


def log_mel_clips(pack: AudioPack, num_mels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Each clip's kept frames [frames, M]."""
    layout = AudioLayout.build(pack.num_samples, 2, 3000, "cpu")
    mel_TM = LogMel(num_mels)(pack.pcm_S, layout, dtype)
    assert mel_TM.dtype == dtype
    assert not mel_TM[~layout.is_kept_T].any(), "gaps must be zero"
    return [mel_TM[(layout.owner_T == i) & layout.is_kept_T] for i in range(len(pack.num_samples))]


@pytest.mark.parametrize("num_mels", [80, 128])
def test_filters_equal_slaneys(num_mels, relative_error):
    reference = torch.from_numpy(hf_mel_filter_bank(201, num_mels, 0.0, 8000.0, 16000, "slaney", "slaney"))
    assert relative_error(mel_filter_bank(num_mels), reference) < 1e-13


def test_equals_whisper_on_30_s_in_fp64(make_pack, mel_30_s):
    pack = make_pack(LENGTHS_S)
    reference_BMT = mel_30_s(pack, 80)
    for i, clip in enumerate(log_mel_clips(pack, 80, torch.float64)):
        frames = -(-pack.num_samples[i] // 160)
        assert len(clip) == min(frames + 2, 3000)
        torch.testing.assert_close(clip, reference_BMT[i, :, : len(clip)].T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_mels", [80, 128])
def test_equals_the_published_extractor_in_fp32(num_mels, make_pack):
    pack = make_pack([0.01, 0.5, 2.017, 30.0])
    clips = [clip.numpy().astype(np.float32) for clip in pack.pcm_S.split(pack.num_samples)]
    reference = WhisperFeatureExtractor(feature_size=num_mels)(clips, sampling_rate=16000)["input_features"]
    for ours, theirs in zip(log_mel_clips(pack, num_mels, torch.float32), reference, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs[:, : len(ours)].T, rtol=0, atol=2e-4)


def test_frames_that_are_not_kept_hold_the_floor(make_pack, mel_30_s):
    """The reason why two frames after the clip are enough."""
    pack = make_pack([0.0123, 0.5])
    reference_BMT = mel_30_s(pack, 80)
    for i, samples in enumerate(pack.num_samples):
        beyond = reference_BMT[i, :, -(-samples // 160) + 2 :]
        assert beyond.min() == beyond.max() == reference_BMT[i].min()


def test_a_clip_does_not_depend_on_its_neighbours(make_pack):
    pack = make_pack([0.3, 0.4, 0.5])
    loud = AudioPack(torch.cat([pack.pcm_S[:4800], 50 * pack.pcm_S[4800:]]), pack.num_samples)
    alone = AudioPack(pack.pcm_S[:4800], [4800])
    torch.testing.assert_close(log_mel_clips(loud, 80, torch.float64)[0], log_mel_clips(alone, 80, torch.float64)[0])


def test_int16_equals_the_same_samples_as_floats(make_pack):
    pack = make_pack([0.3, 0.4])
    pcm_S = (pack.pcm_S.clamp(-0.9, 0.9) * 32768).to(torch.int16)
    as_float = AudioPack(pcm_S.float() / 32768, pack.num_samples)
    for a, b in zip(
        log_mel_clips(AudioPack(pcm_S, pack.num_samples), 80, torch.float32),
        log_mel_clips(as_float, 80, torch.float32),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_digital_silence_is_finite():
    (clip,) = log_mel_clips(AudioPack(torch.zeros(1600, dtype=torch.int16), [1600]), 80, torch.float32)
    torch.testing.assert_close(clip, torch.full_like(clip, (-10 + 4) / 4))
