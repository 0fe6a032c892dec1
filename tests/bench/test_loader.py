from bench.loader import LoaderBench, Speed, bench, report


def test_ours_is_measured_packed_and_loose_and_set_beside_peers():
    found = bench(LoaderBench(num_clips=40, seconds=0.2, batch_size=8, measure_s=0.1, peers=()))
    assert set(found) == {"ours, packed", "ours, loose files"}
    assert all(speed.clips_per_s > 0 and speed.clips_per_core_s > 0 for speed in found.values())


def test_the_ratio_is_by_processor_time():
    lines = report({"ours, packed": Speed(100, 90), "peer": Speed(50, 30)})
    assert lines[2].split() == ["peer", "50", "30", "3.00x"]
