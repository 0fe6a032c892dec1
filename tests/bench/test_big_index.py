from bench.big_index import make_index, start
from data.shards import open_packed


def test_a_synthetic_index_opens_and_a_fresh_process_gets_its_first_batch(tmp_path):
    make_index(tmp_path / "index", 3000)
    table = open_packed(tmp_path / "index")
    assert len({table.clip_id(row) for row in (0, 1, 2999)}) == 3
    assert table[2999].terms == ("term-0002999",)
    found = start(tmp_path / "index", 16)
    assert found["first_s"] > 0
    assert found["trainer"] > 1e6
    assert found["worker"] > 1e6
