"""One process: damage, fallback, pruning, failures."""

import logging
import os

import pytest
import torch

from distributed.atomic import MANIFEST, read_tensors, write_tensors
from distributed.checkpoints import CheckpointError, CheckpointStore


def write_step(step):
    return lambda folder: write_tensors(folder / "heads.safetensors", {"w": torch.full((500,), float(step))})


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    store.prepare()
    for step in (1, 2):
        store.save(step, write_step(step))
    return store


def flip_a_bit(folder):
    file = folder / "heads.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    read_tensors(file)  # loads silently: the format has no checksum


def truncate(folder):
    os.truncate(folder / "heads.safetensors", 1000)


def remove_a_file(folder):
    (folder / "heads.safetensors").unlink()


def remove_the_manifest(folder):
    (folder / MANIFEST).unlink()


def cut_the_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def empty_the_manifest(folder):
    (folder / MANIFEST).write_text("[]")


def point_outside(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("heads.safetensors", "../../heads.safetensors"))


@pytest.mark.parametrize(
    ("hurt", "named"),
    [
        (flip_a_bit, "heads.safetensors has another sha256"),
        (truncate, "heads.safetensors has 1000 bytes"),
        (remove_a_file, "heads.safetensors is missing"),
        (remove_the_manifest, "MANIFEST.json is missing"),
        (cut_the_manifest, "MANIFEST.json cannot be read"),
        (empty_the_manifest, "MANIFEST.json cannot be read"),
        (point_outside, "outside the folder"),
    ],
)
def test_damage_falls_back_and_says_so(store, caplog, hurt, named):
    hurt(store.root / "step-00000002")
    with caplog.at_level(logging.WARNING):
        chosen = store.latest_good()
    assert chosen == store.root / "step-00000001"
    assert read_tensors(chosen / "heads.safetensors")["w"][0] == 1
    assert named in caplog.text
    assert "falling back to checkpoint" in caplog.text


def test_no_good_checkpoint_is_none(store):
    for step in (1, 2):
        truncate(store.root / f"step-{step:08d}")
    assert store.latest_good() is None


def test_a_good_newest_gives_no_warning(store, caplog):
    assert store.latest_good() == store.root / "step-00000002"
    assert not caplog.records


def test_keeps_the_last_ones_and_never_drops_the_one_just_written(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.prepare()
    for step in (3, 9):
        store.save(step, write_step(step))
    assert store.steps() == [9]
    truncate(store.root / "step-00000009")
    store.save(4, write_step(4))  # resumed from before 9, which is damaged: 4 is the newest good one
    assert store.latest_good() == store.root / "step-00000004"


def test_saving_a_step_again_replaces_the_damaged_one(store):
    truncate(store.root / "step-00000002")
    store.save(2, write_step(7))
    assert read_tensors(store.latest_good() / "heads.safetensors")["w"][0] == 7


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_full_is_said_clearly_and_loses_nothing(store):
    def write(folder):
        write_step(3)(folder)
        with open("/dev/full", "wb") as full:
            full.write(bytes(100))

    with pytest.raises(CheckpointError, match=r"disk is full .*free some space"):
        store.save(3, write)
    assert sorted(item.name for item in store.root.iterdir()) == ["step-00000001", "step-00000002"]
    assert store.latest_good() == store.root / "step-00000002"


def test_prepare_clears_what_a_killed_save_left(store):
    (store.root / ".step-00000003.tmp-0a1b2c3d").mkdir()
    (store.root / ".step-00000003.tmp-0a1b2c3d" / "heads.safetensors").touch()
    os.rename(store.root / "step-00000002", store.root / ".step-00000002.old")  # killed while it was replaced
    store.prepare()
    assert sorted(item.name for item in store.root.iterdir()) == ["step-00000001", "step-00000002"]
    assert store.latest_good() == store.root / "step-00000002"


def test_more_ranks_than_saved_have_no_random_state(store, caplog):
    path = store.root / "step-00000002"
    assert store.restore_rng(path)
    (path / "rng-rank0.safetensors").unlink()
    assert not store.restore_rng(path)
    assert "number of ranks has grown" in caplog.text
