"""What is not seen by way of load_clips (test_clips.py): how paths are joined, without any file."""

from pathlib import Path

import pytest

from data.fields import RecordError
from data.paths import PathResolver
from data.settings import InputSettings


def resolver(*existing, **settings):
    return PathResolver(
        Path("/set/samples.json"), InputSettings(data_root="/root", **settings), set(existing).__contains__
    )


def test_the_first_place_that_exists_is_taken():
    assert resolver("/set/a.wav", "/root/a.wav").resolve("a.wav") == "/set/a.wav"
    assert resolver("/root/a.wav").resolve("./x/../a.wav") == "/root/a.wav"


def test_segments_of_one_recording_look_for_it_once():
    looked = []
    found = PathResolver(Path("/set/s.json"), InputSettings(), lambda path: looked.append(path) or True)
    assert [found.resolve(name) for name in ("a", "a", "b", "a")] == ["/set/a", "/set/a", "/set/b", "/set/a"]
    assert looked == ["/set/a", "/set/b", "/set/a"]


def test_a_place_within_a_container_is_looked_for_by_its_file():
    assert resolver("/set/s.tar").resolve("s.tar:512+100") == "/set/s.tar:512+100"
    with pytest.raises(RecordError, match=r"looked for /set/s\.tar, /root/s\.tar"):
        resolver().resolve("s.tar:512+100")


@pytest.mark.parametrize("path", ["../a.wav", "x/../../a.wav", "../s.tar:0+1"])
def test_no_relative_path_leaves_its_root(path):
    with pytest.raises(RecordError, match="leaves /set") as caught:
        resolver("/a.wav", "/s.tar").resolve(path)
    assert caught.value.reason == "outside_root"


@pytest.mark.parametrize(
    "name", ["line\nbreak.wav", "井号键.wav", "שלום.wav", "🎧.wav", " space .wav", "a" * 250 + ".wav"]
)
def test_any_name_that_a_file_can_have(name, tmp_path, wav):
    wav(name)
    found = PathResolver(tmp_path / "samples.json", InputSettings()).resolve(name)
    assert found == str(tmp_path / name)
