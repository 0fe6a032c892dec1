from bench.pack import PackBench, bench, measure_memory


def test_packing_is_set_beside_plain_decoding():
    lines = bench(PackBench(num_clips=20, seconds=0.2, formats=("wav",), num_workers=1))
    assert [line.split()[1] for line in lines[1:]] == ["packing", "soundfile,", "soundfile,"]
    assert lines[1].endswith("1.00x")


def test_listing_many_records_is_measured():
    assert measure_memory(500).startswith("500 records, 0 MB of JSON: listed and indexed in ")
