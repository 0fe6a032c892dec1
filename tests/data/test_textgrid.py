"""TextGrids written by praatio, which reads and writes Praat's own forms."""

import time

import pytest
from praatio import textgrid as praat

from data.textgrid import Interval, read_textgrid

ENTRIES = [(0.0, 0.42, "press"), (0.42, 0.55, 'say "the"'), (0.55, 1.3, "井号 [key] xmin = 5")]


@pytest.fixture
def written(tmp_path):
    """written("long_textgrid") -> path of a grid of two interval tiers and a point tier, 0 to 2 s."""

    def write(form, encoding="utf-8"):
        grid = praat.Textgrid()
        grid.addTier(praat.IntervalTier("words", ENTRIES, 0, 2.0))
        grid.addTier(praat.PointTier("clicks", [(0.5, "x"), (1.5, "y")], 0, 2.0))
        grid.addTier(praat.IntervalTier("phones", [(0.1, 0.2, "p")], 0, 2.0))
        path = tmp_path / "a.TextGrid"
        grid.save(str(path), format=form, includeBlankSpaces=True)
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
        return path

    return write


@pytest.mark.parametrize("form", ["long_textgrid", "short_textgrid"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_both_forms_hold_the_same(written, form, encoding):
    grid = read_textgrid(written(form, encoding))
    assert (grid.start_s, grid.end_s) == (0.0, 2.0)
    assert list(grid.tiers) == ["words", "phones"]
    assert grid.tiers["words"] == [*(Interval(*one) for one in ENTRIES), Interval(1.3, 2.0, "")]
    assert grid.tiers["phones"] == [Interval(0.0, 0.1, ""), Interval(0.1, 0.2, "p"), Interval(0.2, 2.0, "")]


@pytest.mark.parametrize("form", ["long_textgrid", "short_textgrid"])
def test_a_grid_cut_off_anywhere_is_refused(written, form):
    path = written(form)
    content = path.read_bytes().rstrip()
    for size in range(0, len(content) - 1, 7):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut off|no TextGrid|should|cannot be read"):
            read_textgrid(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ooTextFile", "ooBinaryFile", "no TextGrid in text form"),
        ('"IntervalTier"', '"MagicTier"', "a tier of class 'MagicTier'"),
        ("size = 3", "size = -3", "-3.0 stands where a count should"),
        ("size = 3", "size = 1e400", "inf stands where a number should"),
        ("size = 3", "size = 999999999999", "ends in the middle"),
        ("xmax = 0.42", 'xmax = "0.42"', "'0.42' stands where a number should"),
    ],
)
def test_other_files_are_refused(written, old, new, message):
    path = written("long_textgrid")
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_textgrid(path)


def test_a_file_of_brackets_or_quotes_takes_no_time(tmp_path):
    path = tmp_path / "a.TextGrid"
    for hostile in ("[" * 1_000_000, '"' * 1_000_001, '"a' * 500_001, "[1" * 500_000, '"' + "x" * 1_000_000):
        path.write_text('"ooTextFile" "TextGrid" 0 1 ' + hostile)
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"cut off|should"):
            read_textgrid(path)
        assert time.monotonic() - start < 10, hostile[:3]


def test_bytes_and_missing_files(tmp_path):
    (tmp_path / "a.TextGrid").write_bytes(b"ooBinaryFile\x08\xff\xfe\x00")
    for path in (tmp_path / "a.TextGrid", tmp_path / "none.TextGrid", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            read_textgrid(path)
