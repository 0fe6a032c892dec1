import os
import stat

import pytest
import torch

from distributed import atomic


def entries(folder):
    return sorted(item.name for item in folder.iterdir())


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "status.json"
    atomic.write_file_atomically(path, b"one")
    atomic.write_file_atomically(path, lambda temporary: temporary.write_bytes(b"two"))
    assert path.read_bytes() == b"two"

    def fails_half_way(temporary):
        temporary.write_bytes(b"thr")
        (temporary.parent / ".tmpABC").touch()  # safetensors leaves such strays
        raise OSError("boom")

    with pytest.raises(OSError, match="boom"):
        atomic.write_file_atomically(path, fails_half_way)
    assert path.read_bytes() == b"two"
    assert entries(tmp_path) == ["status.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask_where_safetensors_makes_0600(tmp_path, umask):
    before = os.umask(umask)
    try:
        atomic.write_folder_atomically(
            tmp_path / "model_best", lambda folder: atomic.write_tensors(folder / "w.safetensors", {"w": torch.ones(2)})
        )
        atomic.save_single_file(tmp_path / "model_best.pt", {"w": torch.ones(2)}, {})
    finally:
        os.umask(before)
    for path, full in (("model_best", 0o777), ("model_best/w.safetensors", 0o666), ("model_best.pt", 0o666)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == full & ~umask, path
    assert stat.S_IMODE((tmp_path / "model_best/MANIFEST.json").stat().st_mode) == 0o666 & ~umask


def test_folder_is_replaced_and_a_failed_write_leaves_the_old_one(tmp_path):
    path = tmp_path / "model_best"
    for text in ("one", "two"):
        atomic.write_folder_atomically(path, lambda folder, text=text: (folder / "a").write_text(text))
    assert (path / "a").read_text() == "two"
    assert atomic.damage(path) is None

    def fails(folder):
        (folder / "a").write_text("three")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_folder_atomically(path, fails)
    assert (path / "a").read_text() == "two"
    assert entries(tmp_path) == ["model_best"]


def test_a_kill_between_the_renames_is_recovered(tmp_path, monkeypatch):
    path = tmp_path / "model_best"
    atomic.write_folder_atomically(path, lambda folder: (folder / "a").write_text("old"))
    genuine = os.rename

    def killed_before_the_second(source, target):
        if target == path:
            raise SystemExit  # as near to a kill as a test in one process gets
        genuine(source, target)

    monkeypatch.setattr(os, "rename", killed_before_the_second)
    with pytest.raises(SystemExit):
        atomic.write_folder_atomically(path, lambda folder: (folder / "a").write_text("new"))
    monkeypatch.undo()
    assert not path.exists()
    assert atomic.recover_folder(path)
    assert (path / "a").read_text() == "old"
    assert not atomic.recover_folder(path)


def test_a_refused_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "model_best"
    atomic.write_folder_atomically(path, lambda folder: (folder / "a").write_text("old"))
    genuine = os.rename

    def refuse(source, target):
        if ".tmp-" in source.name:
            raise OSError("refused")
        genuine(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        atomic.write_folder_atomically(path, lambda folder: (folder / "a").write_text("new"))
    assert (path / "a").read_text() == "old"
    assert entries(tmp_path) == ["model_best"]


def test_manifest_covers_subfolders(tmp_path):
    def write(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("text")

    atomic.write_folder_atomically(tmp_path / "m", write)
    (tmp_path / "m" / "sub" / "a").write_text("tezt")
    assert "sub/a" in atomic.damage(tmp_path / "m")


def test_json_is_strict():
    with pytest.raises(ValueError, match="JSON"):
        atomic.json_bytes({"best": float("-inf")})


def test_views_and_shared_tensors_are_written_alone(tmp_path):
    base = torch.arange(100_000.0)
    whole = torch.ones(5)
    tensors = {"view": base[10:14], "column": base.view(2, -1)[:, 3], "tied_a": whole, "tied_b": whole}
    atomic.write_tensors(tmp_path / "a.safetensors", tensors)
    atomic.save_single_file(tmp_path / "a.pt", tensors, {"step": 3})
    loaded, meta = atomic.load_single_file(tmp_path / "a.pt")
    assert meta == {"step": 3}
    assert (tmp_path / "a.pt").stat().st_size < 10_000  # not the base of 400 kB
    for name, expected in tensors.items():
        assert torch.equal(loaded[name], expected)
        assert torch.equal(atomic.read_tensors(tmp_path / "a.safetensors")[name], expected)


def test_single_file_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"tensors": {"w": Payload()}, "meta": {}}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        atomic.load_single_file(tmp_path / "bad.pt")
    assert not (tmp_path / "pwned").exists()
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a one-file copy"):
        atomic.load_single_file(tmp_path / "other.pt")


def test_some_files_of_a_folder_are_replaced_at_once_and_the_others_stay_the_same_files(tmp_path):
    path = tmp_path / "model_best"
    atomic.write_folder_atomically(path, lambda f: [(f / n).write_bytes(n.encode()) for n in ("a.json", "b.bin")])
    inode = (path / "b.bin").stat().st_ino
    atomic.replace_files(path, {"a.json": b"new", "c.json": b"more"})
    assert {f.name: f.read_bytes() for f in path.iterdir() if f.name != atomic.MANIFEST} == {
        "a.json": b"new", "b.bin": b"b.bin", "c.json": b"more",
    }  # fmt: skip
    assert (path / "b.bin").stat().st_ino == inode
    assert atomic.damage(path) is None
    assert entries(tmp_path) == ["model_best"]


def test_files_are_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    path = tmp_path / "model_best"
    atomic.write_folder_atomically(path, lambda folder: (folder / "b.bin").write_bytes(b"b"))
    monkeypatch.setattr(os, "link", no_links)
    atomic.replace_files(path, {"a.json": b"new"})
    assert (path / "b.bin").read_bytes() == b"b"
    assert atomic.damage(path) is None


def test_a_folder_without_a_manifest_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match=r"MANIFEST\.json cannot be read"):
        atomic.replace_files(tmp_path, {"a.json": b"new"})
    assert entries(tmp_path) == []
