"""Which terms may be a clip's hard negatives, on embeddings that are set by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bin.search_clips import ClipSearch
from data.audio import AudioError
from data.clips import Clip
from data.drops import DropLog
from data.glossary import Entry, Glossary

# Cosine with the clip, by angle. "Keys" is a variant of "key", "hash" an alias of "pound key".
ANGLES = {"pound key": 0.0, "hash": 0.1, "near": 0.2, "far": 1.2, "key": 0.9, "keys": 0.8}
ANGLES |= {"spoken word": 0.7, "cut off": 0.6}


class FixedClips(nn.Module):
    """Every clip is the vector (1, 0)."""

    windows = None

    def encode_audio(self, pack):
        return torch.tensor([[1.0, 0.0]]).repeat(len(pack.num_samples), 1)


class Reader:
    def read(self, path, start_s, end_s):
        if path == "bad":
            raise AudioError("silent", path)
        return np.ones(10, dtype=np.int16)


def clip(terms=(), ignored=(), text="", path="good") -> Clip:
    return Clip(path, path, None, None, text, tuple(terms), tuple(ignored), tuple(terms), not terms, "test")


@pytest.fixture
def search():
    entries = [Entry(term, term.title(), aliases=["hash"] if term == "pound key" else []) for term in ANGLES]
    term_NE = torch.tensor([[math.cos(a), math.sin(a)] for a in [*ANGLES.values(), 0.5]])

    def run(*clips: Clip, num_negatives: int = 9, margin: float = 0.05) -> list[list[str]]:
        terms = [*ANGLES, "absent label"]
        searcher = ClipSearch(FixedClips(), terms, term_NE, Glossary("g", entries), num_negatives, margin)
        return [found for _, found in searcher(clips, Reader(), DropLog())]

    return run


def test_hardest_first_without_what_is_spoken_and_one_of_each_variant(search) -> None:
    mine = clip(["pound key"], ["cut offs"], "the spoken words of it")
    assert search(mine, margin=0.0) == [["Near", "Keys", "Far"]]
    assert search(mine, margin=0.05) == [["Keys", "Far"]]  # cos 0.2 = 0.98 is above 0.95
    assert search(mine, margin=0.05, num_negatives=1) == [["Keys"]]


def test_a_label_that_the_glossary_lacks_sets_the_limit_too(search) -> None:
    assert search(clip(["absent label"]), margin=0.0) == [["Cut Off", "Spoken Word", "Keys", "Far"]]


def test_a_clip_without_terms_has_no_limit_and_a_bad_one_no_line(search) -> None:
    everything = ["Pound Key", "Near", "Cut Off", "Spoken Word", "Keys", "Far"]
    assert search(clip(), clip(path="bad"), clip(["key"])) == [everything, ["Far"]]
    assert search(clip(path="bad")) == []
