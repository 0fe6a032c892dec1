"""A data set of tones on which the whole program runs in seconds: each term is a chord, so it can really be learned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile as sf

ROOT = Path(__file__).resolve().parents[2]
TERMS = ("voicemail", "pound key", "mailbox", "conference", "extension", "keypad")

AUDIO = {
    "model_type": "whisper",
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 20,
    "max_source_positions": 1500,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tokenizer": "bytes",
}


def write_samples(folder: Path, name: str, num_clips: int, seed: int) -> Path:
    """A samples file of short WAV clips; every fifth has no term."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(num_clips):
        terms = [] if i % 5 == 4 else [TERMS[i % len(TERMS)]]
        time_S = np.arange(int(16_000 * rng.uniform(0.3, 0.6))) / 16_000
        wave_S = rng.normal(0, 0.01, time_S.shape)
        for term in terms:
            place = TERMS.index(term)
            wave_S += 0.2 * np.sin(2 * np.pi * (300 + 400 * place) * time_S)
        path = folder / f"{name}_{i}.wav"
        sf.write(path, wave_S, 16_000, subtype="PCM_16")
        suffix = "" if terms else "_no_term_0"
        records.append(
            {
                "segment_id": f"{name}_{i}{suffix}",
                "term_chunk_audio": path.name,
                "term_chunk_text": f"the {terms[0]} of {name} {i}" if terms else f"nothing {i}",
                "term_chunk_audio_ground_truth_terms": terms,
            }
        )
    samples = folder / f"{name}.json"
    samples.write_text(json.dumps(records))
    return samples


def write_architectures(folder: Path) -> tuple[Path, Path]:
    """audio.json and text.json: towers that are built from nothing."""
    paths = folder / "audio.json", folder / "text.json"
    for path, config in zip(paths, (AUDIO, TEXT), strict=True):
        path.write_text(json.dumps(config))
    return paths


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def torchrun(flags: list[str], ranks: int = 2, program: Path | None = None) -> list[str]:
    """The command line of a run of `ranks` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(program or ROOT / "bin" / "train.py"), *flags]


def finish(command: list[str], cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=180, check=False
    )
