"""With maxsim, too, a step over real ranks is the step of one process: windows stay at home, their scores travel."""

from pathlib import Path

import pytest

from bin.step import encode_all
from distributed.atomic import read_tensors
from tests.bin.ranks_maxsim import READOUT
from tests.bin.ranks_step import SPREADS, batch_of, build
from tests.distributed.launching import launch


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maxsim")
    launch(1, folder, "tests.bin.ranks_maxsim:maxsim_steps")
    return folder


@pytest.mark.parametrize("spread", SPREADS)
def test_loss_and_gradients_equal_one_process(written: Path, spread: str) -> None:
    expected = read_tensors(written / "one process 0.safetensors")
    for rank in range(2):
        found = read_tensors(written / f"{spread} {rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            size = float(value.abs().max())
            assert size > 1e-6, f"{name} is zero in the reference: its comparison says nothing"
            assert float((found[name] - value).abs().max()) < 1e-9 * size, name


def test_only_the_scores_of_terms_differ_from_the_mean(written: Path) -> None:
    maxsim, mean = (read_tensors(written / f"{name} 0.safetensors") for name in ("one process", "mean"))
    assert abs(float(maxsim["loss of audio_text"] - mean["loss of audio_text"])) < 1e-12  # texts meet the clip's mean
    for name in ("audio_term", "hard", "no_term"):
        assert abs(float(maxsim[f"loss of {name}"] - mean[f"loss of {name}"])) > 1e-3, name


def test_a_batch_without_clips_has_no_windows(tmp_path: Path) -> None:
    built, _ = build(tmp_path, **READOUT)
    none = encode_all(built.model, batch_of(built, []))
    assert none.clips is not None
    assert none.clips.num_clips == 0
    some = encode_all(built.model, batch_of(built, [0, 5]))
    assert some.clips is not None
    assert some.clips.num_clips == 2
    assert sum(some.clips.counts) == len(some.clips.window_WE)
