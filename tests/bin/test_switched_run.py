"""A whole training run with every optimisation on, and one with all of them off: the same losses.

Without a GPU `auto` means plain torch for kernels and attention, and no graphs: those are held against their references
in Triton's interpreter, one by one, and together by bench/switches.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import bin.train
from bin.config import parse

ON = (
    *("--kernels", "auto", "--attention", "auto", "--cuda_graphs", "auto", "--loss_kernels", "fused"),
    *("--lora_fused", "--lora_joint", "--flat_optimizer"),
)
OFF = (
    *("--kernels", "torch", "--attention", "sdpa", "--cuda_graphs", "off", "--loss_kernels", "dense"),
    *("--no-lora_fused", "--no-lora_joint", "--no-flat_optimizer"),
)


def test_a_run_with_everything_on_learns_as_one_with_everything_off(
    flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    curves = []
    for name, switches in (("on", ON), ("off", OFF)):
        more = ("--trainable", "lora", "--tower_dropout", "0", "--lora_dropout", "0", "--epochs", "2")
        assert bin.train.train(parse(flags("--run_name", name, *more, *switches))) == 0
        lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["train/loss"] for line in lines if "train/loss" in line])
    on, off = curves
    assert len(on) == 6
    assert max(off) - min(off) > 0.02 * off[0]
    assert on == pytest.approx(off, rel=1e-4)
