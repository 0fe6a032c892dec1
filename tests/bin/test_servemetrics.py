"""Figures in Prometheus' text format add up."""

from bin.servemetrics import BUCKETS_S, ServeMetrics


def test_counts_buckets_and_sums() -> None:
    metrics = ServeMetrics()
    for status, seconds in ((200, 0.004), (200, 0.005), (200, 0.3), (503, 99.0)):
        metrics.answered(status, seconds)
    lines = metrics.render({"clips_total": ("counter", 7)}).splitlines()
    assert 'earmark_requests_total{status="200"} 3' in lines
    assert 'earmark_requests_total{status="503"} 1' in lines
    assert 'earmark_request_seconds_bucket{le="0.005"} 2' in lines, "a bound belongs to its bucket"
    assert 'earmark_request_seconds_bucket{le="0.5"} 3' in lines
    assert 'earmark_request_seconds_bucket{le="+Inf"} 4' in lines
    assert "earmark_request_seconds_count 4" in lines
    assert "earmark_request_seconds_sum 99.309000" in lines
    assert lines.index("# TYPE earmark_clips_total counter") + 1 == lines.index("earmark_clips_total 7")
    assert sum("bucket" in line for line in lines) == len(BUCKETS_S) + 1
