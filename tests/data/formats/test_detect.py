import gzip
import json

import pytest

from data.formats.detect import IMPORTERS, format_of, importer_for
from data.settings import InputSettings

CUT = {"type": "MonoCut", "id": "c", "start": 0, "duration": 1, "channel": 0, "supervisions": [], "recording": {}}
FIRST = {
    "term_chunks": {"segment_id": "a", "term_chunk_audio": "a.wav"},
    "chunk_rows": {"term": "a", "chunk_audio_path": "a.wav"},
    "lhotse_cuts": CUT,
    "nemo_manifest": {"audio_filepath": "a.wav", "text": ""},
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize(
    "before", [[], [5, "text", None, [1]], [{"other": {"audios": 1}}]], ids=["first", "later", "other"]
)
@pytest.mark.parametrize("kind", ["array", "lines", "gzip", "one line cut off"])
def test_json_is_told_by_the_keys_of_its_first_known_object(tmp_path, name, before, kind):
    records = [*before, FIRST[name], FIRST[name] | {"padding": "x" * 100_000}]
    if kind == "array":
        content = json.dumps(records, indent=1).encode()
    else:
        content = "".join(json.dumps(one) + "\n" for one in records if isinstance(one, dict)).encode()
    if kind == "one line cut off":
        content = json.dumps(FIRST[name] | {"padding": "x" * 100_000}).encode()
    path = tmp_path / ("x.jsonl.gz" if kind == "gzip" else "x.json")
    path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    assert format_of(path) == name
    assert importer_for(path, InputSettings()) is IMPORTERS[name]


def test_gigaspeech_is_one_object(tmp_path):
    head = {"dataset": "GigaSpeech", "language": "EN", "audios": [{"aid": "POD1", "segments": []}] * 2000}
    for indent in (None, 2):
        (tmp_path / "GigaSpeech.json").write_text(json.dumps(head, indent=indent))
        assert format_of(tmp_path / "GigaSpeech.json") == "gigaspeech"


def test_folders_and_files_by_their_suffix(tmp_path):
    (tmp_path / "a" / "ann").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"holds \*.TextGrid or \*.tar files; this one has none"):
        format_of(tmp_path)
    (tmp_path / "b" / "s.tar").touch()
    assert format_of(tmp_path) == "webdataset"
    (tmp_path / "a" / "ann" / "1.TextGrid").touch()
    assert format_of(tmp_path / "a") == "textgrids"
    assert format_of(tmp_path / "b" / "s.tar") == "webdataset"
    assert format_of(tmp_path / "a" / "ann" / "1.TextGrid") == "textgrids"


@pytest.mark.parametrize("content", [b"", b"[]", b'[{"a": NaN}]', b"[" * 100_000, b'{"a": 1}', b"RIFF", b"\xff{"])
def test_what_is_not_known_is_left_to_the_messages_of_term_chunks(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert format_of(tmp_path / "x.json") == "term_chunks"


def test_a_format_can_be_named(tmp_path):
    assert importer_for(tmp_path / "none", InputSettings(samples_format="nemo_manifest")) is IMPORTERS["nemo_manifest"]
    with pytest.raises(ValueError, match="samples_format is 'kaldi'; allowed are auto, term_chunks, chunk_rows"):
        importer_for(tmp_path / "none", InputSettings(samples_format="kaldi"))
    with pytest.raises(ValueError, match="cannot be read"):
        importer_for(tmp_path / "none", InputSettings())


def test_settings_that_a_format_has_no_use_for_are_told(tmp_path, caplog):
    importer_for(tmp_path, InputSettings(samples_format="textgrids", term_margin_s=0.5, no_term_ratio=1.0))
    importer_for(tmp_path, InputSettings(samples_format="gigaspeech", gigaspeech_subset="XS"))
    assert not caplog.text
    importer_for(tmp_path, InputSettings(samples_format="term_chunks", term_margin_s=0.5, gigaspeech_subset="XS"))
    assert "gigaspeech_subset is XS, which is ignored" in caplog.text
    assert "term_margin_s is 0.5, which is ignored" in caplog.text
    assert "no_term_ratio" not in caplog.text
