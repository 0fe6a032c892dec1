"""upload and fetch with the real client against a server on the loopback: by content, only what changed."""

import os
from collections.abc import Iterator
from pathlib import Path

import modal
import modal_files
import pytest

from tests.launch import modal_server
from tests.launch.modal_server import ModalServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ModalServer]:
    with modal_server.serving(tmp_path / "modal") as running:
        yield running


@pytest.fixture
def volume(server: ModalServer) -> Iterator[modal.Volume]:
    """A volume of that server, as the client sees it."""
    with modal.Client(server.url, 1, ("ak-test", "as-test")) as client:
        yield modal.Volume.from_name("earmark-data", create_if_missing=True, client=client)


def sent(server: ModalServer) -> list[str]:
    """Files that were put on a volume since the last look, without the manifest."""
    names = [f.filename for request in server.requests["VolumePutFiles"] for f in request.files]
    server.requests["VolumePutFiles"].clear()
    return sorted(name for name in names if not name.endswith(modal_files.MANIFEST))


def test_only_what_changed_is_sent(
    server: ModalServer, volume: modal.Volume, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    (shards / "a").mkdir(parents=True)
    (shards / "a" / "0.dat").write_bytes(b"one")
    (shards / "1.dat").write_bytes(b"two")
    (shards / ".hidden").write_bytes(b"no")
    modal_files.upload(volume, [str(shards)])
    assert sent(server) == ["/shards/1.dat", "/shards/a/0.dat"]
    there = server.volume_folder("earmark-data")
    assert (there / "shards" / "a" / "0.dat").read_bytes() == b"one"
    assert "2 to send" in capsys.readouterr().out

    modal_files.upload(volume, [str(shards)])
    assert sent(server) == []

    stamp = (shards / "1.dat").stat()
    (shards / "1.dat").write_bytes(b"2nd")  # other content, same size, same time
    os.utime(shards / "1.dat", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    modal_files.upload(volume, [str(shards)])
    assert sent(server) == ["/shards/1.dat"]
    assert (there / "shards" / "1.dat").read_bytes() == b"2nd"

    (there / "shards" / "a" / "0.dat").unlink()  # removed on the volume, behind the manifest's back
    modal_files.upload(volume, [str(shards)])
    assert sent(server) == ["/shards/a/0.dat"]


def test_single_files_another_folder_and_interrupted_uploads(
    server: ModalServer, volume: modal.Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modal_files, "GROUP_FILES", 1)
    for name in ("terms.json", "train.json"):
        (tmp_path / name).write_text(name)
    words = [str(tmp_path / "terms.json"), str(tmp_path / "train.json"), "--to", "speech"]
    server.refuse_put = 3  # a file, the manifest, and now the second file
    with pytest.raises(modal.exception.Error, match="the line is dead"):
        modal_files.upload(volume, words)
    server.refuse_put = 0
    assert sent(server) == ["/speech/terms.json", "/speech/train.json"]
    modal_files.upload(volume, words)
    assert sent(server) == ["/speech/train.json"]


def test_a_path_that_is_not_there(volume: modal.Volume, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"upload: .*none does not exist"):
        modal_files.upload(volume, [str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="upload: no file under"):
        modal_files.upload(volume, [str(tmp_path / "empty")])


def test_fetch_brings_results_and_leaves_checkpoints(
    server: ModalServer, volume: modal.Volume, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = server.volume_folder("earmark-data") / "r1"
    volume.hydrate()
    for name, content in {"metrics.jsonl": b"{}\n", "model_best/heads.safetensors": b"w" * 5000, "empty": b""}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "checkpoints" / "step-1" / "optim.safetensors").write_bytes(b"m" * 9)
    words = ["r1", "--to", str(tmp_path / "here")]
    modal_files.fetch(volume, words)
    here = tmp_path / "here" / "r1"
    assert (here / "model_best" / "heads.safetensors").read_bytes() == b"w" * 5000
    assert (here / "empty").read_bytes() == b""
    assert not (here / "checkpoints").exists()
    assert not list(here.rglob("*.part"))
    assert "3 new of 4 files" in capsys.readouterr().out

    (run / "metrics.jsonl").write_bytes(b"{}\n{}\n")
    modal_files.fetch(volume, words)
    assert "1 new of 4 files" in capsys.readouterr().out
    assert (here / "metrics.jsonl").read_bytes() == b"{}\n{}\n"
    modal_files.fetch(volume, [*words, "--all"])
    assert (here / "checkpoints" / "step-1" / "optim.safetensors").exists()
    with pytest.raises(ValueError, match="there is no run 'r2' on the volume"):
        modal_files.fetch(volume, ["r2"])
