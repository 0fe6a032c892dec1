"""A made-up run to report on, hostile strings included."""

from dataclasses import replace
from typing import Any

import torch

from data.clips import Clip
from retrieval.judgements import Judgements
from retrieval.measured import Measured, account
from retrieval.ranks import rank_positives
from retrieval.report import Report

TERMS = ("</script><script>alert('term')</script>", "שלום עולם", "🔥 fire & <b>ice</b>", "plain term", "other", "more")


def measured_run(sizes: tuple[int, ...] = (6,)) -> Measured:
    """24 clips over six terms; every fourth names none."""
    generator = torch.Generator().manual_seed(1)
    clips = []
    for i in range(24):
        terms = () if i % 4 == 3 else (TERMS[i % 6],)
        said = f"said {i} </p><img src=x onerror=alert(1)> \u202eright to left"
        clips.append(Clip(f"clip<{i}>", "gone.wav", 0.5, 1.5, said, terms, (), terms, not terms, "x", duration_s=1.0))
    ranked = [*TERMS, *(f"distractor {i}" for i in range(max(sizes) - 6))]
    scores = torch.rand(24, len(ranked), generator=generator)
    by_size = {}
    for size in sizes:
        judgements = Judgements.from_terms(ranked[:size], [c.terms for c in clips], seen_terms=TERMS[:3])
        by_size[size] = rank_positives(scores[:, :size], range(24), judgements, num_top=5)
    return Measured(clips, ranked, 6, by_size)


def metrics_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "time": 100.0, "before/recall@10": 0.125}]
    for step in range(1, 7):
        recall = None if step == 3 else step / 10
        lines.append({"step": step, "epoch": step / 2, "time": 100.0 + step, "train/loss": 5.0 - step / 2,
                      "train/loss_hard": 1.0 / step, "train/clips_per_s": 40.0 + step, "train/step_ms": 21.0,
                      "data/wait_ms": 0.5})  # fmt: skip
        lines.append({"step": step, "epoch": step / 2, "time": 100.5 + step, "eval/recall@1": recall,
                      "eval/recall@5": recall, "eval/recall@10": recall})  # fmt: skip
    return lines


def full_report() -> Report:
    """Everything a page can hold."""
    measured = measured_run((6, 16))
    threshold = {"value": 0.83125, "k": 5, "target": "precision=0.5", "samples": "dev.json"}
    found = account(measured, threshold, {TERMS[0]: 4}, num_resamples=50)
    found["run"] = {
        "counts": {"Training clips": 123_456},
        "dropped": "7 of 900 records dropped (silent 7)",
        "drops": {"silent": 7},
        "notes": {"term_too_short": 2},
        "drop_examples": [{"kind": "drop", "reason": "silent", "source": "a.json:<3>", "detail": "peak 0"}],
        "environment": {"torch": "9.9.9", "git_revision": "abcdef0123456789", "argv": ["train.py", "</script>"]},
        "seconds": 12.5,
        "clips_per_s": 2.0,
        "world_size": 2,
    }
    misses = measured.misses(50)
    sounds: list[tuple[str, bytes] | None] = [("audio/wav", b"RIFF" + bytes(40)), *([None] * (len(misses) - 1))]
    settings = {"train": {"lr": 1e-4, "note": "</script>"}, "data": {"dev_samples_path": "dev.json"}}
    status = {"state": "finished", "message": "Recall@10 0.5 <b>"}
    return Report("run </title><script>", found, misses, sounds, settings, metrics_lines(), status, "2026-01-02 03:04")


def bare_report() -> Report:
    """An evaluation without a run: one size, no threshold, no curves."""
    measured = measured_run()
    return replace(full_report(), account=account(measured, num_resamples=5), settings={}, metrics=(), status=None,
                   misses=(), sounds=())  # fmt: skip
