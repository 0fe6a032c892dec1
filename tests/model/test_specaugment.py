"""Masks: inside each clip, bounded, only in training, and replayed by a restored RNG."""

import pytest
import torch

from model.build import build_model
from model.packing import AudioLayout
from model.settings import ModelSettings
from model.specaugment import SpecAugment


def masked(augment, seconds=(0.5, 3.0, 0.01)):
    """True where a mask fell, each clip [valid frames, M]."""
    layout = AudioLayout.build([int(s * 16000) for s in seconds], 2, 3000, "cpu")
    mel_TM = augment(torch.ones(len(layout.owner_T), 80), layout)
    return [mel_TM[(layout.owner_T == i) & (layout.place_T < n)] == 0 for i, n in enumerate(layout.num_frames)]


def test_time_masks_are_whole_frames_and_bounded():
    widths = set()
    for _ in range(50):
        short, long, tiny = masked(SpecAugment(time_masks=1, time_width_frames=40))
        for clip in (short, long):
            assert torch.equal(clip.any(1), clip.all(1))
            hit = clip[:, 0].nonzero()[:, 0]
            assert len(hit) == 0 or len(hit) == hit[-1] - hit[0] + 1
        assert short[:, 0].sum() <= 50 / 4, "never more than a quarter of a short clip"
        assert not tiny.any()
        widths.add(int(long[:, 0].sum()))
    assert max(widths) <= 40
    assert len(widths) > 10


def test_frequency_masks_are_whole_bins_and_differ_between_clips():
    differs = False
    for _ in range(20):
        first, second, _ = masked(SpecAugment(freq_masks=2, freq_width_bins=10))
        for clip in (first, second):
            assert torch.equal(clip.any(0), clip.all(0))
            assert clip.all(0).sum() <= 20
        differs |= not torch.equal(first[0], second[0])
    assert differs


def test_a_restored_rng_gives_the_same_masks():
    augment = SpecAugment(2, 40, 2, 10)
    state = torch.get_rng_state()
    first = masked(augment)
    other = masked(augment)
    torch.set_rng_state(state)
    again = masked(augment)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("masks", [0, 2])
def test_it_runs_in_training_only_and_only_when_asked(masks, architecture_files, make_pack):
    settings = ModelSettings(
        audio_model=architecture_files[0],
        text_model=architecture_files[1],
        trainable="full",
        spec_time_masks=masks,
        spec_freq_masks=masks,
    )
    model = build_model(settings).model
    pack = make_pack([1.0, 0.4])
    exact = model.encode_audio(pack)
    assert torch.equal(model.encode_audio(pack), exact)
    assert torch.equal(model.train().encode_audio(pack), exact) == (masks == 0)
