import json
from pathlib import Path

import pytest
import torch

from bench.feeding import FeedBench, feed_alone, make_set, random_towers, waits
from bin.config import parse
from model.audio_tower import AudioConfig
from model.text_tower import TextConfig


def test_feeding_alone_is_measured(tmp_path):
    packed = make_set(tmp_path, 24, 0.2, seed=0)
    found = feed_alone(packed, FeedBench(batch_size=4, num_workers=1), torch.device("cpu"))
    assert found["clips_per_s"] > 0
    assert 0 < found["median_ms"] <= found["p99_ms"]


def test_random_towers_are_flags_of_the_trainer(tmp_path):
    model = parse(random_towers(tmp_path)).model
    audio, text = (json.loads(Path(path).read_text()) for path in (model.audio_model, model.text_model))
    assert AudioConfig.from_hf(audio).d_model == 1280
    assert TextConfig.from_hf(text, use_defaults=False).hidden_size == 4096


def test_waits_leave_out_the_first_steps_of_epochs():
    records = [
        {"step": n, "epoch": n / 4, "train/loss": 1.0, "train/clips_per_s": 10.0, "train/step_ms": 100.0,
         "data/wait_ms": 50.0 if n % 4 == 1 else 1.0}
        for n in range(1, 13)
    ]  # fmt: skip
    found = waits([{"step": 0, "before/recall@1": 0.1}, *records])
    assert found["steps"] == 9
    assert found["p99_ms"] == 1.0
    assert found["share"] == pytest.approx(0.01)
