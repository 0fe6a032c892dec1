"""The clips that the data benchmarks work on: real speech cut into clips of one length, written as loose files."""

import json
from pathlib import Path

import numpy as np
import soundfile as sf

from data.audio import SAMPLE_RATE
from data.clips import load_clips
from data.drops import DropLog
from data.reader import AudioReader
from data.settings import DataSettings

SPEECH = Path(__file__).resolve().parent.parent / "samples" / "telephony" / "train.json"


def make_clips(
    folder: Path, count: int, seconds: float, suffix: str = "wav", speech: Path = SPEECH, seed: int = 0
) -> Path:
    """Write `count` clips at drawn places of the speech, with its texts and terms in turn; gives the samples file.

    Other seeds give other places and ids.
    """
    source = load_clips(speech, DataSettings(), DropLog())
    reader = AudioReader(0)
    speech_S = np.concatenate([reader.read(clip.audio_path, clip.start_s, clip.end_s) for clip in source])
    rng = np.random.default_rng(seed)
    length = round(seconds * SAMPLE_RATE)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        start = int(rng.integers(len(speech_S) - length))
        sf.write(folder / f"{number}.{suffix}", speech_S[start : start + length], SAMPLE_RATE)
        clip = source[number % len(source)]
        records.append(
            {
                "segment_id": f"clip-{seed}-{number}",
                "term_chunk_audio": f"{number}.{suffix}",
                "term_chunk_text": clip.text,
                "term_chunk_audio_ground_truth_terms": list(clip.surfaces),
            }
        )
    samples = folder / "samples.json"
    samples.write_text(json.dumps(records), encoding="utf-8")
    return samples
