import numpy as np
import pytest
import soundfile as sf

from data.audio import AudioError, probe, read_pcm
from data.containers import Place, place_of, real_path
from tests.data.conftest import RATE, tone


def test_a_place_is_written_and_read_back():
    place = Place("/x/shard 1.tar", 1536, 88244)
    assert str(place) == "/x/shard 1.tar:1536+88244"
    assert place_of(str(place)) == place


@pytest.mark.parametrize(
    "path", ["/x/a.wav", "/x/a.wav:0+5", "/x/a.tar", "/x/a.tar:5", "/x/a.tar:-1+5", "/x/a.tar.gz:0+5"]
)
def test_other_paths_are_whole_files(path):
    assert place_of(path) == Place(path)


def test_samples_of_a_place_are_those_of_the_file_alone(tmp_path):
    pcm_S = np.random.default_rng(0).integers(-3000, 3000, 8000, dtype=np.int16)
    sf.write(tmp_path / "a.flac", pcm_S, RATE)
    alone = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "s.tar").write_bytes(bytes(512) + alone + bytes(700))
    (tmp_path / "s.dat").write_bytes(bytes(10) + pcm_S.astype("<i2").tobytes() + bytes(4))
    for place in (Place(str(tmp_path / "s.tar"), 512, len(alone)), Place(str(tmp_path / "s.dat"), 10, 16_000)):
        assert probe(str(place)).frames == 8000
        np.testing.assert_array_equal(read_pcm(str(place)), pcm_S)
        np.testing.assert_array_equal(read_pcm(str(place), 0.1, 0.2), pcm_S[1600:3200])


def test_places_beyond_their_file_or_of_no_audio_are_refused(tmp_path):
    sf.write(tmp_path / "a.wav", tone(), RATE)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "s.tar").write_bytes(content)
    (tmp_path / "s.dat").write_bytes(content)
    reasons = {
        f"s.tar:0+{len(content) + 1}": "truncated",
        f"s.dat:2+{len(content)}": "truncated",
        "s.tar:0+0": "empty_file",
        "s.tar:100+200": "not_audio",
        "s.tar:0+1000": "truncated",
        "none.tar:0+10": "missing",
    }
    for place, reason in reasons.items():
        with pytest.raises(AudioError) as caught:
            read_pcm(tmp_path / place)
        assert caught.value.reason == reason, place


def test_links_are_followed_within_containers_too(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"x")
    (tmp_path / "link.tar").symlink_to(tmp_path / "s.tar")
    assert real_path(str(tmp_path / "link.tar:5+6")) == f"{(tmp_path / 's.tar').resolve()}:5+6"
    assert real_path(str(tmp_path / "link.tar")) == str((tmp_path / "s.tar").resolve())
