"""What is fuzzed: the record parser, each importer, the glossary, TextGrids, tars, and the arrays of old shards.

Half of the inputs are records with the right keys and wrong values, half are good files with damaged bytes. What an
importer gives has to be in order, too: texts and ids that UTF-8 holds, spans that go forward, terms in normal form.

To add a reader (of shards, say), write a function from a damaged file to what it took, and list it in `targets`; for a
reader of folders, `damaged_folder` makes a copy of a good one in which one file is damaged.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from hypothesis import strategies as st

from data.audio import AudioError
from data.clips import Clip, iterate_clips, load_clips
from data.drops import DropLog
from data.glossary import load_glossary
from data.legacy_shards import LegacyShards
from data.object_arrays import strings_of_pickle
from data.packing import pack_clips
from data.reader import AudioReader
from data.records import iterate_records, keys_at_start
from data.settings import DataSettings
from data.shards import open_packed, verify
from data.terms import normalise_term, unusable_reason
from data.windows import load_prompts
from tests.fuzz.harness import Target, damaged

TERM_CHUNK = {
    "segment_id": "s1",
    "term_chunk_audio": "a.wav",
    "term_chunk_text": "press the pound key",
    "term_chunk_audio_ground_truth_terms": ["Pound Key"],
    "term_chunk_audio_start": 0.1,
    "term_chunk_audio_end": 0.4,
    "partial_terms": ["star"],
    "is_no_term_chunk": False,
    "speaker": "ann",
}
CHUNK_ROW = {
    "term": "Pound Key",
    "term_key": "pound key",
    "chunk_src_text": "press the pound key",
    "utter_id": "u1",
    "chunk_idx": 0,
    "chunk_audio_path": "a.wav",
}
NEMO = {"audio_filepath": "a.wav", "offset": 0.1, "duration": 0.3, "text": "press the pound key", "terms": ["star"]}
WORDS = [["press", 0.05, 0.1, None], ["pound", 0.2, 0.1, 0.9], ["key", 0.3, 0.1, None]]
SUPERVISION = {"id": "s1", "start": 0.0, "duration": 0.45, "text": "pound key", "alignment": {"word": WORDS}}
RECORDING = {"id": "a", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}], "transforms": []}
CUT = {
    "id": "c1",
    "start": 0.0,
    "duration": 0.5,
    "channel": 0,
    "supervisions": [SUPERVISION, {"id": "s2", "start": 0.1, "duration": 0.2, "custom": {"terms": ["star"]}}],
    "recording": RECORDING,
    "type": "MonoCut",
}
SEGMENT = {"sid": "a_S1", "begin_time": 0.0, "end_time": 0.4, "subsets": ["{XL}"], "text_tn": "POUND KEY <COMMA> X"}
AUDIO = {"aid": "a", "path": "a.wav", "speaker": "N/A", "segments": [SEGMENT, SEGMENT | {"sid": "a_S2"}]}
PROMPT = {"id": "p", "audio": "a.wav", "duration_s": 0.5, "words": [{"word": "pound", "start": 0.1, "end": 0.2}]}
GLOSSARY = {
    "Pound Key": {"term": "pound key", "target_translations": {"zh": "井号键"}, "aliases": ["hash"]},
    "star": None,
}
GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.5
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.2
            text = "pound"
        intervals [2]:
            xmin = 0.2
            xmax = 0.5
            text = "key"
"""


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**30), 2**63, 0, -1]),
    st.floats(allow_nan=False),
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\ud800", "a\0b", "../a.wav", "/etc/passwd", "a.wav", "s.tar:0+5", "x" * 3000, "\u202e🎧"]
    ),
    st.sampled_from([150, 190, 250, 900]).map(nested),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn, record: dict[str, Any]) -> Any:
    """The record with up to three values, at any depth, replaced or taken out; now and then any other value."""
    if draw(st.integers(0, 30)) == 0:
        return draw(VALUES)
    copy = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(0, 3))):
        place = copy
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.integers(0, 4)) == 0:
                del place[key]
            else:
                place[key] = draw(VALUES)
            break
    return copy


def written(record: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Files of a good record and altered ones: an array, lines, or either with damaged bytes, now and then packed."""
    good = [record, record | {"a": "[é]"}, record]
    as_array = st.lists(altered(record), max_size=4).map(lambda rows: json.dumps([record, *rows]).encode())
    as_lines = st.lists(altered(record), max_size=4).map(lambda rows: _lines([record, *rows]))
    broken = damaged([json.dumps(good).encode(), _lines(good), json.dumps(good, indent=1, ensure_ascii=False).encode()])
    plain = as_array | as_lines | broken | broken
    return plain | plain | plain | plain.map(gzip.compress) | damaged([gzip.compress(_lines(good))])


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _check(clip: Clip) -> None:
    for text in (clip.clip_id, clip.text, clip.audio_path, clip.speaker, clip.recording, *clip.surfaces):
        text.encode("utf-8")
    assert "\0" not in clip.audio_path
    assert clip.audio_path.startswith("/")
    assert all(value is None or (math.isfinite(value) and value >= 0) for value in (clip.start_s, clip.end_s))
    assert clip.end_s is None or (clip.start_s or 0.0) < clip.end_s
    assert all(normalise_term(term) == term and unusable_reason(term) is None for term in clip.terms)
    assert len(clip.terms) == len(clip.surfaces) == len(set(clip.terms))
    assert clip.is_no_term == (not clip.terms)
    assert not set(clip.terms) & set(clip.ignored)


class Workshop:
    """A folder with a.wav, a glossary, and room for one input at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sf.write(folder / "a.wav", 0.1 * np.sin(np.arange(8000)), 16_000)
        (folder / "terms.txt").write_text("pound key\npound\nstar\n")
        self.settings = DataSettings(data_root=str(folder), glossary_path=str(folder / "terms.txt"))

    def clips(self, name: str, samples_format: str = "auto") -> Callable[[bytes], int]:
        """A function that reads the bytes as a samples file of this name."""
        settings = DataSettings(**(vars(self.settings) | {"samples_format": samples_format}))

        def read(content: bytes) -> int:
            (self.folder / name).write_bytes(content)
            drops = DropLog(1.0)
            clips = load_clips(self.folder / name, settings, drops)
            for clip in clips:
                _check(clip)
            assert len({clip.clip_id for clip in clips}) == len(clips)
            json.dumps(drops.lines())
            return len(clips)

        return read

    def file(self, name: str, take: Callable[[Path], int]) -> Callable[[bytes], int]:
        """A function that writes the bytes to a file of this name and gives its path to `take`."""

        def read(content: bytes) -> int:
            (self.folder / name).write_bytes(content)
            return take(self.folder / name)

        return read

    def records(self, path: Path) -> int:
        keys = list(keys_at_start(path))
        return len(list(iterate_records(path))) + len(keys)

    def prompts(self, path: Path) -> int:
        return len(load_prompts(path, self.settings, DropLog(1.0)))


def damaged_folder(good: Path, scratch: Path, take: Callable[[Path], int]) -> Target:
    """A target that damages one file of a copy of the folder `good` and gives the copy to `take`."""
    names = sorted(str(file.relative_to(good)) for file in good.rglob("*") if file.is_file())
    inputs = st.sampled_from(names).flatmap(lambda n: st.tuples(st.just(n), damaged([(good / n).read_bytes()])))

    def read(value: tuple[str, bytes]) -> int:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(good, scratch)
        (scratch / value[0]).write_bytes(value[1])
        return take(scratch)

    return Target(good.name, inputs, read)


def _tar() -> bytes:
    content = io.BytesIO()
    buffer = io.BytesIO()
    sf.write(buffer, 0.1 * np.sin(np.arange(800)), 16_000, format="WAV")
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in (
            ("k1.wav", buffer.getvalue()),
            ("k1.json", json.dumps({"text": "pound key", "terms": ["star"]}).encode()),
            ("a/k2.wav", buffer.getvalue()),
            ("a/k2.txt", b"press star"),
            ("a/" + "long" * 40 + ".txt", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def _old_shard(folder: Path) -> Path:
    good = folder / "old_shards"
    good.mkdir()
    np.arange(300, dtype="<i2").tofile(good / "shard_00000.dat")
    names = {name: np.array([f"a/{name}1.wav", "é"], dtype=object) for name in ("key", "relpath")}
    dtypes = np.array(["int16", "int16"], dtype=object)
    np.savez(good / "shard_00000.index.npz", **names, dtype=dtypes, offset=[0, 100], length=[100, 200])
    return good


def _packed(shop: Workshop) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(4):
        sf.write(shop.folder / f"p{number}.wav", rng.normal(0, 0.1, 400 + number), 16_000, subtype="PCM_16")
        rows.append(TERM_CHUNK | {"segment_id": f"p{number}", "term_chunk_audio": f"p{number}.wav"})
        rows[-1]["term_chunk_audio_start"], rows[-1]["term_chunk_audio_end"] = 0.0, None
    (shop.folder / "packed.json").write_text(json.dumps(rows))
    drops = DropLog(1.0)
    pack_clips(iterate_clips(shop.folder / "packed.json", shop.settings, drops), shop.folder / "packed", drops)
    return shop.folder / "packed"


def read_packed(folder: Path) -> int:
    """All clips of a packed folder with their samples. What `verify` has nothing against must also be in order."""
    is_whole = not verify(folder)
    table, reader, taken = open_packed(folder), AudioReader(0), 0
    assert len(table.positive_term_places) <= len(table.terms)
    for clip in table:
        if is_whole:
            _check(clip)
        try:
            taken += bool(len(reader.read(clip.audio_path, clip.start_s, clip.end_s)))
        except AudioError:
            continue  # refused by its reason, counted by the loader
    return taken


def targets(folder: Path) -> list[Target]:
    """All targets; they work in `folder`."""
    shop = Workshop(folder)
    tables = altered(GLOSSARY).map(lambda table: json.dumps(table).encode())
    pickles = [pickle.dumps(np.array(["a", "b" * 300, "é"], dtype=object), protocol) for protocol in (2, 4)]
    return [
        Target("records", written(TERM_CHUNK), shop.file("r.json", shop.records)),
        Target("term_chunks", written(TERM_CHUNK), shop.clips("t.json")),
        Target("chunk_rows", written(CHUNK_ROW), shop.clips("c.jsonl", "chunk_rows")),
        Target("nemo_manifest", written(NEMO), shop.clips("n.json", "nemo_manifest")),
        Target("lhotse_cuts", written(CUT), shop.clips("l.jsonl.gz", "lhotse_cuts")),
        Target(
            "gigaspeech",
            st.lists(altered(AUDIO), max_size=3).map(lambda rows: json.dumps({"audios": [AUDIO, *rows]}).encode())
            | damaged([json.dumps({"dataset": "x", "audios": [AUDIO, AUDIO]}).encode()]),
            shop.clips("g.json", "gigaspeech"),
        ),
        Target("textgrids", damaged([GRID.encode(), GRID.encode("utf-16")]), shop.clips("a.TextGrid")),
        Target("webdataset", damaged([_tar()]), shop.clips("w.tar")),
        Target("word times", written(PROMPT), shop.file("p.jsonl", shop.prompts)),
        Target(
            "glossary",
            tables | damaged([json.dumps(GLOSSARY).encode()]),
            shop.file("g2.json", lambda path: len(load_glossary(path, DropLog(1.0)).entries)),
        ),
        Target("object arrays", damaged(pickles), lambda content: len(strings_of_pickle(content))),
        damaged_folder(_old_shard(folder), folder / "scratch", lambda path: len(LegacyShards(path))),
        damaged_folder(_packed(shop), folder / "scratch", read_packed),
    ]
