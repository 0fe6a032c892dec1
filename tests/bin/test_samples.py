import gzip
import json

import pytest

from bin.samples import read_samples, write_lines
from data.drops import DropLog
from data.settings import InputSettings


@pytest.mark.parametrize("name", ["a/x.jsonl", "x.jsonl.gz"])
def test_lines_are_written_whole_and_the_same_every_time(tmp_path, name):
    records = [{"text": "井号键"}, {"text": "🎧"}]
    for _ in range(2):
        write_lines(tmp_path / name, records)
        content = (tmp_path / name).read_bytes()
    text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
    assert [json.loads(line) for line in text.splitlines()] == records
    write_lines(tmp_path / "again" / name, records)
    assert (tmp_path / "again" / name).read_bytes() == content
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_lines(tmp_path / name, [records[0], {"x": float("nan")}])
    assert (tmp_path / name).read_bytes() == content, "a failure leaves what was there"


def test_samples_that_cannot_be_found_name_the_flag(tmp_path):
    with pytest.raises(ValueError, match="Set --samples_path to the file"):
        read_samples("none.json", "--samples_path", InputSettings(data_root=str(tmp_path)), DropLog())
    with pytest.raises(ValueError, match="term_margin_s"):
        read_samples("none.json", "--samples_path", InputSettings(term_margin_s=-1), DropLog())
