"""Measuring over real ranks gives the bits of one process; what cannot be read is left out and counted."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bin.bank import embed_bank
from bin.evaluation import encode_terms
from data.glossary import Entry, Glossary
from data.reader import AudioReader
from data.terms import key64
from distributed.atomic import read_tensors
from distributed.processes import World
from model.packing import AudioPack
from tests.bin.ranks_evaluation import (
    BATCH_SIZES,
    RANKED,
    UNREADABLE,
    WORLD_SIZES,
    evaluator,
    small_model,
    with_distractors,
)
from tests.bin.ranks_step import build
from tests.bin.tones import write_samples
from tests.distributed.launching import launch

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)
EVERY_SIZE = pytest.mark.parametrize("batch_size", BATCH_SIZES)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_samples(folder, "test", 11, seed=6)
    return folder


@pytest.fixture(scope="module")
def written(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks_evaluation.py found, three of the eleven clips being damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "files"
    shutil.copytree(whole, folder)
    for i in UNREADABLE:
        path = folder / f"test_{i}.wav"
        path.write_bytes(path.read_bytes()[:2000])
    launch(1, folder, "tests.bin.ranks_evaluation:one_file_at_all_world_sizes")
    return folder


def of_ranks(folder: Path, batch_size: int, world_size: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{batch_size} {world_size} {r}.json").read_text()) for r in range(world_size)]


@EVERY_SIZE
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_result_and_embeddings_have_the_bits_of_one_process(written: Path, batch_size: int, world_size: int) -> None:
    expected = of_ranks(written, batch_size, 1)[0]
    embedded = read_tensors(written / f"{batch_size} 1 0.safetensors")
    assert embedded["terms"].shape[0] == len(RANKED)
    assert torch.equal(embedded["terms"], embedded["bank"])
    for rank, found in enumerate(of_ranks(written, batch_size, world_size)):
        assert found["result"] == expected["result"]
        assert len(found["facts"]) == 3
        for name in ("examples", "facts", "account"):
            assert found[name] == expected[name], name
        tensors = read_tensors(written / f"{batch_size} {world_size} {rank}.safetensors")
        for name, value in embedded.items():
            assert torch.equal(tensors[name], value), (name, rank)


@EVERY_SIZE
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_unreadable_clips_are_left_out_and_counted_once(written: Path, batch_size: int, world_size: int) -> None:
    found = of_ranks(written, batch_size, world_size)
    sources = [sorted(line["source"].rpartition(":")[2] for line in one["own drops"]) for one in found]
    assert sorted(source for some in sources for source in some) == [str(i) for i in UNREADABLE]
    for one in found:
        assert one["result"]["num_clips"] == 11 - len(UNREADABLE)
        assert one["result"]["num_no_term_clips"] == 2
        assert one["counts"] == {"truncated": len(UNREADABLE)}
        assert {line["source"] for line in one["merged drops"]} == {f"{written}/test.json:{i}" for i in UNREADABLE}
        assert "test_2" not in [clip_id for clip_id, _ in one["examples"]]
    listed = [json.loads(line) for line in (written / f"bad {batch_size} {world_size}.jsonl").read_text().splitlines()]
    assert len(listed) == len(UNREADABLE)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_drop_limit_is_of_all_ranks_together_and_stops_all(written: Path, world_size: int) -> None:
    found = of_ranks(written, 2, world_size)
    assert world_size == 1 or max(len(one["own drops"]) for one in found) < len(UNREADABLE)
    for one in found:
        assert one["over the limit"].startswith("3 of 11 records dropped (truncated 3)")


def test_recall_is_that_of_a_plain_ranking(whole: Path) -> None:
    built = small_model(whole)
    measure = evaluator(whole, 4, ALONE)
    result = measure(built.model, built.tokenizer)
    with torch.no_grad():
        term_NE = encode_terms(built.model.eval(), built.tokenizer, RANKED, 3, ALONE)
        ranks = {}
        for clip in measure.clips:
            wave_S = torch.from_numpy(measure.reader.read(clip.audio_path).copy())
            order = (built.model.encode_audio(AudioPack(wave_S, [len(wave_S)])) @ term_NE.T)[0].argsort(descending=True)
            names = [RANKED[place] for place in order.tolist()]
            ranks |= {(clip.clip_id, term): names.index(term) + 1 for term in clip.terms}
    assert len(ranks) == result.subsets["all"].num_positives == 9
    for k in (1, 5):
        assert result.recall(k) == sum(rank <= k for rank in ranks.values()) / len(ranks)
    assert {name for (_, name) in ranks} & {*RANKED[:3]}, "both subsets are measured"
    assert {"seen", "unseen"} <= result.subsets.keys()
    assert result.num_terms == len(RANKED)


def test_ignored_terms_are_not_ranked_and_make_no_clip_a_term_clip(whole: Path) -> None:
    built = small_model(whole)
    measure = evaluator(whole, 4, ALONE)
    others = [
        replace(clip, ignored=tuple(term for term in RANKED if term not in clip.terms)[: 8 if clip.terms else 1])
        for clip in measure.clips
    ]
    result = replace(measure, clips=others)(built.model, built.tokenizer)
    assert result.recall(1) == 1.0 > measure(built.model, built.tokenizer).recall(1)
    assert result.num_no_term_clips == 2


def test_a_warning_says_how_many_could_not_be_read(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "files")
    built, measure = small_model(whole), evaluator(tmp_path / "files", 4, ALONE)
    with caplog.at_level(logging.WARNING):
        measure(built.model, built.tokenizer)
        assert not caplog.records
        (tmp_path / "files" / "test_4.wav").unlink()
        measure.reader = AudioReader(0)
        measure(built.model, built.tokenizer)
    assert "1 of 11 clips could not be read" in caplog.text


def test_examples_are_spread_over_the_file_best_term_first(whole: Path, tmp_path: Path) -> None:
    built = small_model(whole)
    measure = evaluator(whole, 4, ALONE)
    measured = measure.measure(built.model, built.tokenizer, num_top=99)
    found = measured.examples(3, k=4)
    assert [clip.clip_id for clip, _ in found] == ["test_0", "test_3", "test_6"]
    with torch.no_grad():
        term_NE = encode_terms(built.model.eval(), built.tokenizer, RANKED, 4, ALONE)
        for clip, names in found:
            wave_S = torch.from_numpy(measure.reader.read(clip.audio_path).copy())
            scores_N = (built.model.encode_audio(AudioPack(wave_S, [len(wave_S)])) @ term_NE.T)[0]
            assert names == [RANKED[place] for place in scores_N.topk(4).indices.tolist()]
    assert measured.examples(0) == []
    everything = measured.examples(99, k=99)
    assert [len(names) for _, names in everything] == [len(RANKED)] * 11


@pytest.mark.parametrize("training", [True, False])
def test_measuring_restores_the_mode_and_never_drops_out(whole: Path, training: bool) -> None:
    built = build(whole, torch.float32, tower_dropout=0.5)[0]
    built.model.train(training)
    measure = evaluator(whole, 4, ALONE)
    state = torch.get_rng_state()
    bank_glossary = Glossary("", [Entry("voicemail", "Voicemail")])
    for work in (
        lambda: measure(built.model, built.tokenizer),
        lambda: measure.measure(built.model, built.tokenizer).examples(2),
        lambda: embed_bank(built.model, built.tokenizer, bank_glossary, 4, ALONE).embeddings_KE.tolist(),
    ):
        assert work() == work()
        assert built.model.training is training
        assert built.model.audio_tower.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in built.model.parameters())


def test_the_bank_knows_its_terms_by_key_and_group(whole: Path) -> None:
    built = small_model(whole)
    glossary = Glossary("", [Entry("voicemail", "Voicemail"), Entry("hash key", "#", aliases=["pound key"])])
    bank = embed_bank(built.model, built.tokenizer, glossary, 1, ALONE)
    assert bank.keys_K.tolist() == [key64("voicemail"), key64("hash key")]
    assert bank.groups_K.tolist() == [glossary.group("voicemails"), glossary.group("pound key")]
    assert not bank.embeddings_KE.requires_grad
    torch.testing.assert_close(bank.embeddings_KE.norm(dim=1), torch.ones(2))


def test_each_size_of_the_glossary_is_measured_as_if_it_were_the_whole(whole: Path) -> None:
    built = small_model(whole)
    measure = with_distractors(evaluator(whole, 4, ALONE))
    found = measure.measure(built.model, built.tokenizer)
    assert list(found.ranks_by_size) == [len(RANKED), len(RANKED) + 10, len(RANKED) + 40]
    assert found.result() == measure(built.model, built.tokenizer)
    alone = replace(measure, terms=[*RANKED, *measure.distractors[:10]], distractors=(), distractor_sizes=())
    assert found.result(len(RANKED) + 10).subsets == alone(built.model, built.tokenizer).subsets


def test_a_distractor_that_is_spoken_or_ignored_is_neither_right_nor_wrong_for_that_clip(whole: Path) -> None:
    measure = evaluator(whole, 4, ALONE)
    clips = [replace(measure.clips[0], text="Press the Star-Key now", ignored=("menus",)), *measure.clips[1:]]
    measure = replace(measure, clips=clips, distractors=("star key", "menu", "zebra"), distractor_sizes=(3,))
    places = {term: place for place, term in enumerate(measure.ranked_terms)}
    assert measure.judgements.ignored[0] == sorted([places["star key"], places["menu"]])
    assert measure.judgements.ignored[1] == []
