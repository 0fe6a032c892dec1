from bench.clip_set import make_clips
from data.audio import read_pcm
from data.clips import load_clips
from data.drops import DropLog
from data.settings import DataSettings


def test_clips_of_one_length_out_of_real_speech(tmp_path):
    clips = load_clips(make_clips(tmp_path, 5, 0.5, "flac"), DataSettings(), DropLog())
    assert [len(read_pcm(clip.audio_path)) for clip in clips] == [8000] * 5
    assert any(clip.terms for clip in clips)
