import shutil

import pytest
import soundfile as sf

from data.leaks import find_leaks, refuse_leaks


def test_clips_apart_pass(clip, wav):
    refuse_leaks([clip("1", wav("a.wav", hertz=440))], [clip("2", wav("b.wav", hertz=441))])


def test_the_same_id(clip, wav):
    train, test = clip("1", wav("a.wav"), segment_id="POD_1"), clip("1#2", wav("b.wav", hertz=300), segment_id="POD_1")
    with pytest.raises(ValueError, match="1 of 1 dev clips have the same id as training clips") as caught:
        refuse_leaks([train], [test], "dev")
    assert "--train_samples_path, --dev_samples_path" in str(caught.value)
    assert "test:1 and test:1#2" in str(caught.value)


def test_records_without_an_id_are_named_after_their_place_which_is_no_leak(clip, wav):
    place = "samples.json:0"
    train = clip("1", wav("a.wav", hertz=300), segment_id=place, source=place)
    refuse_leaks([train], [clip("2", wav("b.wav"), segment_id=place, source=place)])


@pytest.mark.parametrize(
    ("train_span", "test_span", "leaks"),
    [
        ((0.0, 1.0), (0.5, 1.5), True),
        ((None, None), (0.5, 1.5), True),
        ((None, 0.5), (0.4, None), True),
        ((0.0, 1.0), (1.0, 2.0), False),
        ((1.5, None), (0.5, 1.5), False),
    ],
)
def test_overlapping_spans_of_one_file(clip, wav, train_span, test_span, leaks):
    path = wav("a.wav", seconds=2.0)
    train = clip("1", path, start_s=train_span[0], end_s=train_span[1])
    test = clip("2", path, start_s=test_span[0], end_s=test_span[1])
    if not leaks:
        refuse_leaks([train], [test])
        return
    with pytest.raises(ValueError, match="same audio as training"):
        refuse_leaks([train], [test])


def test_a_link_to_the_same_file(clip, wav, tmp_path):
    path = wav("a.wav")
    (tmp_path / "link.wav").symlink_to(path)
    with pytest.raises(ValueError, match="same audio as training"):
        refuse_leaks([clip("1", path)], [clip("2", tmp_path / "link.wav")])


def test_a_copy_under_another_name(clip, wav, tmp_path):
    path = wav("a.wav", hertz=440)
    shutil.copy(path, tmp_path / "copy.wav")
    train = [clip("0", wav("z.wav", hertz=300)), clip("1", path)]
    test = [clip("2", wav("other.wav", hertz=500)), clip("3", tmp_path / "copy.wav")]
    with pytest.raises(ValueError, match="1 of 2 test clips have the same audio content") as caught:
        refuse_leaks(train, test)
    assert "test:1 and test:3" in str(caught.value)
    refuse_leaks(train, test, content=False)


def test_files_that_differ_in_one_byte_at_the_end_are_no_copies(clip, wav, tmp_path):
    path = wav("a.wav")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "b.wav").write_bytes(content)
    refuse_leaks([clip("1", path)], [clip("2", tmp_path / "b.wav")])


def test_a_test_file_that_is_a_slice_of_the_training_file(clip, wav):
    clips = [clip(str(number), wav(f"{number}.wav", hertz=300 + number)) for number in range(6)]
    with pytest.raises(ValueError, match="3 of 3 test clips"):
        refuse_leaks(clips, clips[3:])


def test_the_same_words_whatever_their_case_and_punctuation(clip):
    train = [clip("1", text="Press the pound-key."), clip("2", text="hold")]
    test = [
        clip("3", text="press the POUND key"),
        clip("4", text="press the key"),
        clip("5", text="Hold!"),
        clip("6", text=""),
    ]
    assert [leak.test.clip_id for leak in find_leaks(train, test, "text")] == ["3", "5"]
    assert [leak.test.clip_id for leak in find_leaks(train, test, "text", min_text_words=2)] == ["3"]
    assert find_leaks([clip("7", text="")], test, "text") == []
    refuse_leaks([clip("1", "/none/1.wav", text="hold")], [clip("2", "/none/2.wav", text="hold")])


def test_the_same_samples_in_another_container_or_a_longer_file(clip, wav, tmp_path):
    path = wav("a.wav", seconds=1.0)
    pcm_S, rate = sf.read(path, dtype="int16")
    sf.write(tmp_path / "a.flac", pcm_S, rate)
    sf.write(tmp_path / "part.wav", pcm_S[4000:8000], rate)
    (tmp_path / "bad.wav").write_text("no audio")
    train = [clip("1", path), clip("2", path, start_s=0.25, end_s=0.5), clip("bad", tmp_path / "bad.wav")]
    test = [clip("3", tmp_path / "a.flac"), clip("4", tmp_path / "part.wav"), clip("5", wav("b.wav", hertz=300.0))]
    test.append(clip("none", tmp_path / "none.wav"))
    assert [(leak.train.clip_id, leak.test.clip_id) for leak in find_leaks(train, test, "samples")] == [
        ("1", "3"),
        ("2", "4"),
    ]
    assert find_leaks(train, test, "audio content") == []


def test_members_of_containers_are_compared_by_their_own_bytes(clip, wav, tmp_path):
    content = wav("a.wav").read_bytes()
    (tmp_path / "s.tar").write_bytes(bytes(512) + content + bytes(700) + content)
    first, second = (f"{tmp_path / 's.tar'}:{at}+{len(content)}" for at in (512, 512 + len(content) + 700))
    test = [clip("2", second)]
    assert find_leaks([clip("1", first)], test, "audio") == []
    assert [leak.test.clip_id for leak in find_leaks([clip("1", first)], test, "audio content")] == ["2"]
    assert [leak.test.clip_id for leak in find_leaks([clip("1", second)], test, "audio")] == ["2"]
    assert find_leaks([clip("1", wav("b.wav", hertz=300.0))], test, "audio content") == []
