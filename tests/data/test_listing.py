import pytest

from data.clips import iterate_clips, load_clips
from data.drops import DropLog
from data.listing import blocks_of, clips_at, read_listing, write_listing


@pytest.fixture
def rows(wav, record):
    for name in ("a", "b", "c", "d"):
        wav(f"{name}.wav")
    return [
        record(segment_id="s1", term_chunk_audio="a.wav"),
        record(segment_id="s1", term_chunk_audio="b.wav"),  # the same id, other audio
        record(segment_id="s1", term_chunk_audio="a.wav"),  # the same record
        record(segment_id="s1", term_chunk_audio="a.wav", term_chunk_audio_ground_truth_terms=["city"]),  # joined
        record(segment_id="s2", term_chunk_audio="c.wav", term_chunk_text="键 \u2028 \n x"),
        record(segment_id="s3", term_chunk_audio="c.wav", term_chunk_text="other"),  # conflicts
        record(segment_id="s1#2", term_chunk_audio="d.wav"),  # the name that the second s1 would get
        record(segment_id="s4", term_chunk_audio="d.wav", term_chunk_audio_start=0.1, term_chunk_audio_end=0.3),
    ]


def test_it_lists_what_loading_gives(rows, samples, settings, tmp_path):
    path = samples(rows)
    accounts = [DropLog(), DropLog()]
    count, digest = write_listing(iterate_clips(path, settings, accounts[0]), tmp_path / "list", accounts[0])
    listed, loaded = list(read_listing(tmp_path / "list")), load_clips(path, settings, accounts[1])
    assert count == len(listed) == 5
    named = {clip.clip_id: clip for clip in listed}
    assert len(named) == 5
    assert {"s1", "s1#2", "s2", "s4"} <= set(named)
    for clip, other in zip(listed, loaded, strict=True):
        assert (clip.audio_path, clip.start_s, clip.text, clip.terms) == (
            other.audio_path,
            other.start_s,
            other.text,
            other.terms,
        )
    assert accounts[0].counts == accounts[1].counts == {"duplicate": 1, "conflicting_text": 1}
    assert accounts[0].notes["merged_same_audio"] == 1
    again = write_listing(iterate_clips(path, settings, DropLog()), tmp_path / "list", DropLog())
    assert again == (count, digest)


def test_nothing_gives_an_empty_list(tmp_path):
    assert write_listing([], tmp_path / "list", DropLog())[0] == 0
    assert list(read_listing(tmp_path / "list")) == []


@pytest.mark.parametrize("first", [0, 3, 5])
def test_blocks_are_the_listing_wherever_one_begins(rows, samples, settings, tmp_path, first):
    path = tmp_path / "list"
    write_listing(iterate_clips(samples(rows), settings, DropLog()), path, DropLog())
    with open(path, "rb") as file:
        blocks = [clips_at(file.fileno(), block) for block in blocks_of(path, 2, first)]
    assert [len(block) for block in blocks[:-1]] == [2] * (len(blocks) - 1)
    assert [clip for block in blocks for clip in block] == list(read_listing(path))[first:]


def test_a_run_of_clips_listed_once_is_copied_around_one_that_is_not(clip, tmp_path, monkeypatch):
    """Whatever the size of the pieces; two runs, a record that came twice between them."""
    monkeypatch.setattr("data.listing.COPY_BYTES", 100)
    clips = [clip(f"c{number}", f"{number}.wav", text=f"\r \u2028 {number}") for number in range(9)]
    write_listing([*clips, clips[4]], tmp_path / "list", drops := DropLog())
    assert list(read_listing(tmp_path / "list")) == clips
    assert drops.counts == {"duplicate": 1}
