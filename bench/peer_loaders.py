"""What else reads clips into batches: each peer prepares the clips in its own format and yields packed batches.

The peers get int16 samples, which is what we store, and not WAV files: their containers are compared, not a codec.
Only the first one, torch's DataLoader with soundfile and transformers' feature extractor, is what such projects do with
loose files; its batch holds log-mel frames.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch.utils.data import DataLoader, Dataset

from data.clips import Clip
from data.reader import AudioReader

Tokenize = Callable[[list[str]], list[list[int]]]
Row = dict[str, Any]  # samples (int16 bytes or array), text, terms (JSON)


def packed_batch(rows: Sequence[Row], tokenize: Tokenize) -> dict[str, Any]:
    """What a batch needs: packed samples and tokens, their lengths, unique terms, positives in compressed rows."""
    pcms = [np.frombuffer(row["pcm"], dtype=np.int16) for row in rows]
    texts = [row["text"] for row in rows]
    terms: dict[str, int] = {}
    positives = [[terms.setdefault(term, len(terms)) for term in json.loads(row["terms"])] for row in rows]
    ids = tokenize([*texts, *terms])
    return {
        "pcm": torch.from_numpy(np.concatenate(pcms)),
        "num_samples": [len(pcm) for pcm in pcms],
        "ids": torch.tensor([token for one in ids for token in one]),
        "lengths": [len(one) for one in ids],
        "positives": torch.tensor([place for row in positives for place in row]),
        "indptr": torch.tensor(np.cumsum([0, *map(len, positives)])),
    }


def row_of(clip: Clip, reader: AudioReader) -> Row:
    pcm_S = reader.read(clip.audio_path, clip.start_s, clip.end_s)
    return {"pcm": pcm_S.tobytes(), "text": clip.text, "terms": json.dumps(clip.terms)}


class Collate:
    """`packed_batch` for worker processes, which are sent it."""

    def __init__(self, tokenize: Tokenize) -> None:
        self.tokenize = tokenize

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        return packed_batch(rows, self.tokenize)


class LooseFiles(Dataset):  # type: ignore[type-arg]
    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Row:
        clip = self.clips[index]
        return {"wave": sf.read(clip.audio_path, dtype="float32")[0], "text": clip.text, "terms": list(clip.terms)}


class WhisperCollate:
    """Log-mel frames by transformers' extractor, texts by the tokenizer."""

    def __init__(self, tokenize: Tokenize) -> None:
        from transformers import WhisperFeatureExtractor

        self.tokenize, self.extract = tokenize, WhisperFeatureExtractor(feature_size=128)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        mel = self.extract([row["wave"] for row in rows], sampling_rate=16_000, return_tensors="pt")
        terms = list(dict.fromkeys(term for row in rows for term in row["terms"]))
        return {"mel": mel["input_features"], "ids": self.tokenize([*(row["text"] for row in rows), *terms])}


def stock(clips: Sequence[Clip], folder: Path, batch: int, num_workers: int, tokenize: Tokenize) -> Iterator[Any]:
    return _epochs(
        DataLoader(
            LooseFiles(clips), batch, shuffle=True, num_workers=num_workers, collate_fn=WhisperCollate(tokenize),
            persistent_workers=num_workers > 0, drop_last=True,
        )
    )  # fmt: skip


def webdataset(clips: Sequence[Clip], folder: Path, batch: int, num_workers: int, tokenize: Tokenize) -> Iterator[Any]:
    import webdataset as wds

    folder.mkdir(parents=True)
    reader = AudioReader(0)
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=500, verbose=0) as sink:
        for number, clip in enumerate(clips):
            row = row_of(clip, reader)
            texts = {"txt": row["text"], "terms": row["terms"].encode()}
            sink.write({"__key__": f"{number:08d}", "pcm": row["pcm"], **texts})
    urls = sorted(map(str, folder.glob("*.tar")))

    def rows_of(samples: Iterator[Row]) -> Iterator[Row]:
        for sample in samples:
            yield {"pcm": sample["pcm"], "text": sample["txt"].decode(), "terms": sample["terms"]}

    dataset = wds.WebDataset(urls, shardshuffle=100, workersplitter=wds.split_by_worker).shuffle(1000).compose(rows_of)
    dataset = dataset.batched(batch, collation_fn=Collate(tokenize), partial=False)
    return _epochs(wds.WebLoader(dataset, batch_size=None, num_workers=num_workers, persistent_workers=num_workers > 0))


def litdata(clips: Sequence[Clip], folder: Path, batch: int, num_workers: int, tokenize: Tokenize) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    reader = AudioReader(0)
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, clip in enumerate(clips):
        writer.add_item(number, row_of(clip, reader))
    writer.done()
    writer.merge()
    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=False)
    return _epochs(
        StreamingDataLoader(
            dataset, batch_size=batch, num_workers=num_workers, collate_fn=Collate(tokenize), drop_last=True,
            persistent_workers=num_workers > 0,
        )
    )  # fmt: skip


def mosaic(clips: Sequence[Clip], folder: Path, batch: int, num_workers: int, tokenize: Tokenize) -> Iterator[Any]:
    streaming = importlib.import_module("streaming")  # the package mosaicml-streaming
    importlib.import_module("streaming.base.util").clean_stale_shared_memory()
    reader = AudioReader(0)
    with streaming.MDSWriter(out=str(folder), columns={"pcm": "bytes", "text": "str", "terms": "str"}) as sink:
        for clip in clips:
            sink.write(row_of(clip, reader))
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    return _epochs(
        DataLoader(
            dataset, batch, num_workers=num_workers, collate_fn=Collate(tokenize), drop_last=True,
            persistent_workers=num_workers > 0,
        )
    )  # fmt: skip


def _epochs(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


PEERS = {
    "torch DataLoader + soundfile + WhisperFeatureExtractor": stock,
    "webdataset": webdataset,
    "litdata": litdata,
    "mosaicml-streaming": mosaic,
}
