"""From a folder to terms: opened whole or audio-only, same embeddings; clear answers to all that is wrong."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from data.glossary import load_glossary
from model.packing import AudioPack
from retrieval.index import TermIndex
from retrieval.retriever import Retriever, find_model
from tests.retrieval.small_models import tone

TERMS = ["Voicemail", "pound key", "mailbox", "conference", "extension", "keypad"]


def test_a_run_or_its_model_opens_and_another_folder_is_told(model_folder: Path, tmp_path: Path) -> None:
    assert find_model(model_folder.parent) == find_model(model_folder) == model_folder
    with pytest.raises(ValueError, match=r"holds no model \(looked for .*model_best"):
        Retriever.load(tmp_path)


def test_clips_of_all_lengths_come_back_in_order(retriever: Retriever) -> None:
    clips = [tone(300 + 50 * i, 0.1 + 0.37 * (i * 7 % 5), seed=i) for i in range(9)]
    audio_BE = retriever.encode_audio(clips)
    assert audio_BE.dtype == torch.float32
    for clip, row_E in zip(clips, audio_BE, strict=True):
        alone_BE = retriever.model.encode_audio(AudioPack(torch.from_numpy(clip), [len(clip)]))
        torch.testing.assert_close(row_E, alone_BE[0], rtol=0, atol=2e-6)
    assert retriever.encode_audio([]).shape == (0, 16)
    with pytest.raises(ValueError, match="allowed: a list of clips"):
        retriever.encode_audio(clips[0])


def test_more_audio_than_a_batch_holds(retriever: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [tone(300 + 90 * i, 0.3, seed=i) for i in range(5)]
    together_BE = retriever.encode_audio(clips)
    monkeypatch.setattr("retrieval.retriever.CPU_SAMPLES", 10_000)
    torch.testing.assert_close(retriever.encode_audio(clips), together_BE, rtol=0, atol=2e-6)


def test_search_finds_what_the_product_says(retriever: Retriever) -> None:
    index = retriever.index(TERMS)
    clip = tone(700)
    matches = retriever.search(clip, k=3)
    scores_N = (retriever.encode_audio([clip]) @ index.term_NE.T)[0]
    best = scores_N.argsort(descending=True)[:3].tolist()
    assert [match.surface for match in matches] == [TERMS[n] for n in best]
    assert matches[0].score == pytest.approx(float(scores_N[best[0]]), abs=1e-6)
    assert matches[0].start_s is None
    middle = (matches[0].score + matches[1].score) / 2
    assert retriever.search(clip, k=3, threshold=middle) == matches[:1]
    assert retriever.search(clip, k=3, threshold=1.5) == []
    assert len(retriever.search(clip, k=1000)) == len(TERMS)


def test_terms_are_encoded_in_normal_form(retriever: Retriever) -> None:
    a_NE = retriever.encode_terms(["Pound  KEY", "mailbox"])
    torch.testing.assert_close(a_NE, retriever.encode_terms(["pound key", "mailbox"]))
    np.testing.assert_allclose(a_NE.norm(dim=1), 1, rtol=1e-6)


def test_a_glossary_file_gives_surfaces_and_translations(retriever: Retriever, tmp_path: Path) -> None:
    rows = {"Voice Mail": {"term": "voicemail", "target_translations": {"zh": "语音信箱"}}, "VOICE MAIL": {}, "xx": {}}
    (tmp_path / "g.json").write_text(json.dumps(rows))
    index = retriever.index(tmp_path / "g.json")
    assert len(index) == 1, "duplicate surfaces are one term, and one too short is left out"
    (match,) = retriever.search(tone(440), k=10)
    assert (match.term, match.surface, match.translations) == ("voice mail", "Voice Mail", {"zh": ["语音信箱"]})


def test_extend_encodes_only_what_is_new(retriever: Retriever, tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("mailbox\nhash key\n")
    index = retriever.index(TERMS)
    longer = retriever.extend(index, load_glossary(tmp_path / "g.txt"))
    assert [term.key for term in longer.terms[len(TERMS) :]] == ["hash key"]
    assert torch.equal(longer.term_NE[: len(TERMS)], index.term_NE)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "holds no usable term"),
        (["\u200b \u00a0", "  ", "--"], "term_too_short 3"),
        (["...", "---"], "term_without_letters 2"),
        (["x" * 5_000_000], "term_too_long 1"),
        (["fine", None], "terms[1]: None (NoneType)"),
    ],
)
def test_useless_glossaries_are_told(retriever: Retriever, terms: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        retriever.index(terms)


@pytest.mark.parametrize(("term", "told"), [("", "0 characters"), ("y" * 5_000_000, "5000000 characters")])
def test_terms_that_cannot_be_encoded_are_told_shortly(retriever: Retriever, term: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        retriever.encode_terms(["fine", term])
    assert len(str(caught.value)) < 300


def test_an_index_of_another_model_is_refused(retriever: Retriever, other_model_folder: Path, tmp_path: Path) -> None:
    other = Retriever.load(other_model_folder)
    other.index(TERMS).save(tmp_path)
    with pytest.raises(ValueError, match="made with another model"):
        retriever.use(TermIndex.load(tmp_path))
    with pytest.raises(ValueError, match="no index is in use"):
        Retriever.load(other_model_folder).search(tone(440))


# Audio-only -----------------------------------------------------------------------------------------------------------


def test_audio_only_of_a_full_model(model_folder: Path, retriever: Retriever, tmp_path: Path) -> None:
    index = retriever.index(TERMS)
    deaf = Retriever.load(model_folder, audio_only=True)
    assert not [name for name, _ in deaf.model.named_parameters() if name.startswith(("language_model", "text_head"))]
    deaf.use(index)
    assert deaf.search(tone(440)) == retriever.search(tone(440))
    with pytest.raises(ValueError, match="audio-only"):
        deaf.index(TERMS)
    with pytest.raises(ValueError, match="audio-only"):
        deaf.encode_terms(["mailbox"])


def test_audio_only_needs_no_text_weights_of_the_base(base_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    whole = Retriever.load(adapter_folder)
    moved = tmp_path / "moved"
    shutil.copytree(base_folder, moved)
    (moved / "language_model.safetensors").unlink()
    (moved / "tokenizer.json").unlink()
    deaf = Retriever.load(adapter_folder, model_name=str(moved), audio_only=True)
    assert deaf.fingerprint == whole.fingerprint
    clips = [tone(300), tone(900, 1.1)]
    assert torch.equal(deaf.encode_audio(clips), whole.encode_audio(clips))
    shutil.copy(base_folder / "tokenizer.json", moved)
    with pytest.raises(ValueError, match="missing shards"):
        Retriever.load(adapter_folder, model_name=str(moved))


def test_merged_adapters_encode_the_same(adapter_folder: Path) -> None:
    plain, merged = Retriever.load(adapter_folder), Retriever.load(adapter_folder, merge_adapters=True)
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    torch.testing.assert_close(merged.encode_audio([tone(440)]), plain.encode_audio([tone(440)]), rtol=0, atol=1e-5)
    torch.testing.assert_close(merged.encode_terms(TERMS), plain.encode_terms(TERMS), rtol=0, atol=1e-5)


def test_paths_and_their_faults(retriever: Retriever, tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", tone(440), 16_000)
    assert torch.equal(retriever.encode_audio([tmp_path / "a.wav"]), retriever.encode_audio([tone(440)]))
    (tmp_path / "b.wav").write_bytes(b"not audio at all")
    with pytest.raises(ValueError, match=r"clips\[1\]: .*b\.wav: not_audio"):
        retriever.encode_audio([tmp_path / "a.wav", tmp_path / "b.wav"])


def test_audio_only_fetches_no_text_weights_from_the_hub(
    base_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        for file in base_folder.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    heard = Retriever.load(adapter_folder, model_name="Owner/Name", audio_only=True)
    assert {path.name for path in cache.glob("*.safetensors")} == {"audio_tower.safetensors"}
    whole = Retriever.load(adapter_folder, model_name="Owner/Name")
    assert len(list(cache.glob("*.safetensors"))) == 2
    assert torch.equal(heard.encode_audio([tone(300)]), whole.encode_audio([tone(300)]))
