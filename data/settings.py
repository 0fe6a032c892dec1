"""What can be set about samples, audio files, random windows and augmentation.

Each field's docstring is its help text on the command line. Limits that are no matter of taste (0.01 to 30 s a clip,
16 kHz mono) stand as constants in `data/audio.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SamplesFormat = Literal[
    "auto", "term_chunks", "chunk_rows", "gigaspeech", "lhotse_cuts", "nemo_manifest", "textgrids", "webdataset"
]


@dataclass
class InputSettings:
    """What reading samples needs, in training and in the programs that convert, split and pack."""

    samples_format: SamplesFormat = "auto"
    """Format of the samples files; auto tells it from the file's name and beginning."""
    glossary_path: str | None = None
    """Glossary (JSON, JSON Lines, CSV, TSV or TXT): hard negatives, aliases, and labels of samples that have none."""
    data_root: str = "."
    """Folder under which sample files, glossaries and relative audio paths are looked for."""
    audio_root: str | None = None
    """Folder of relative audio paths; replaces the folder of the samples file and data_root."""
    path_remap: tuple[str, ...] = ()
    """OLD=NEW pairs: audio paths that start with OLD start with NEW instead."""
    legacy_shards: str | None = None
    """Folder of old shards (shard_00000.dat with .index.npz) that hold the audio which the samples name."""
    max_bad_fraction: float = 0.02
    """The run fails when more than this share of the records has to be dropped."""
    term_margin_s: float = 1.0
    """Where samples come with word times: seconds of audio that a term's chunk has on either side of the term."""
    no_term_ratio: float = 0.25
    """Where samples come with word times: chunks without a term, as a multiple of those with one."""
    gigaspeech_subset: str | None = None
    """GigaSpeech.json: only segments of this subset (XL, L, M, S, XS, DEV, TEST); by default all."""

    def validate_input(self) -> None:
        """Raise ValueError for the first field whose value is not allowed."""
        _between("max_bad_fraction", self.max_bad_fraction, 0.0, 1.0)
        _between("term_margin_s", self.term_margin_s, 0.0, 10.0)
        _between("no_term_ratio", self.no_term_ratio, 0.0, 100.0)
        for pair in self.path_remap:
            if "=" not in pair or not pair.split("=", 1)[0]:
                raise ValueError(f"path_remap is {pair!r}; allowed is OLD=NEW, as in /mnt/old=/data/new")


@dataclass
class DataSettings(InputSettings):
    train_samples_path: str = "data/xl_term_level_chunks_merged.json"
    """Training samples (a samples file or a packed folder), looked for as given and then under data_root."""
    test_samples_path: str = "data/samples/xl/term_level_chunks_500000_1000000.json"
    """Test samples; without dev_samples_path they also steer the learning rate and early stopping."""
    dev_samples_path: str | None = None
    """Samples that steer learning rate and early stopping; the test is then measured only before and after."""
    check_audio: bool = True
    """Read every audio header once before training, in parallel, and drop the files that cannot be used."""
    check_cache_path: str | None = None
    """File that remembers the header checks; by default ~/.cache/earmark/audio_checks.jsonl."""
    check_leak_content: bool = True
    """Compare the content of test files with training files too, not only their ids and paths."""
    mask_spoken_terms: bool = True
    """A term that a clip's text holds without being labelled is no negative of that clip."""
    hard_neg_jsonl: str | None = None
    """Mined hard negatives (JSON Lines of audio_key and hard_negs, as bin/mine.py writes): embedded with each batch."""
    hard_neg_mined: int = 2
    """Mined negatives a clip in each batch, drawn anew each epoch; each one is a further string for the text tower."""
    hard_neg_strict: bool = False
    """Refuse a file of mined negatives that is stale, unstamped or of other data, instead of warning."""
    num_workers: int = 2
    """Worker processes a training process that read audio and build batches ahead; 0 = none."""
    audio_cache_mb: int = 512
    """Memory a training process, shared out among its workers, for decoded audio files; 0 = decode again each time."""
    batch_terms: Literal["random", "spread", "gather"] = "random"
    """Which clips meet in a batch: any; as many different terms as can be; or groups of terms that look alike."""
    word_times_path: str | None = None
    """JSON Lines of whole prompts with word times, out of which random windows are drawn."""
    window_fraction: float = 0.0
    """Random windows an epoch, as a multiple of the number of training clips; needs word_times_path."""
    window_min_s: float = 0.4
    """Shortest random window, in seconds, where the prompt is long enough."""
    window_max_s: float = 3.0
    """Longest random window, in seconds."""
    window_words_as_terms: bool = False
    """Every word of three letters or more within a random window is a term too."""
    augment_speed: float = 0.0
    """Largest relative change of speed: 0.1 plays a training clip at 0.9 to 1.1 times its speed."""
    augment_noise: float = 0.0
    """Share of the training clips that get noise added."""
    augment_snr_db: tuple[float, float] = (10.0, 30.0)
    """Lowest and highest signal-to-noise ratio of that noise, in dB."""
    augment_band: float = 0.0
    """Share of the training clips whose band is limited as by a telephone or a cheap microphone."""
    augment_gain_db: float = 0.0
    """Largest change of loudness of a training clip, in dB either way."""

    def validate(self) -> None:
        """Raise ValueError for the first field whose value is not allowed."""
        self.validate_input()
        _between("hard_neg_mined", self.hard_neg_mined, 1, 1000)
        _between("num_workers", self.num_workers, 0, 256)
        _between("audio_cache_mb", self.audio_cache_mb, 0, math.inf)
        _between("window_fraction", self.window_fraction, 0.0, 1000.0)
        _between("window_min_s", self.window_min_s, 0.01, 30.0)
        _between("window_max_s", self.window_max_s, self.window_min_s, 30.0)
        _between("augment_speed", self.augment_speed, 0.0, 0.5)
        _between("augment_noise", self.augment_noise, 0.0, 1.0)
        _between("augment_band", self.augment_band, 0.0, 1.0)
        _between("augment_gain_db", self.augment_gain_db, 0.0, 60.0)
        low, high = self.augment_snr_db
        _between("augment_snr_db (lowest)", low, -20.0, 100.0)
        _between("augment_snr_db (highest)", high, low, 100.0)
        if self.window_fraction > 0 and not self.word_times_path:
            raise ValueError(
                f"window_fraction is {self.window_fraction}, but windows are drawn out of prompts with word times: "
                "set word_times_path, or window_fraction to 0"
            )


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} is {value}; allowed are {low} to {high}")
