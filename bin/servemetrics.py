"""Counts of the service in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ServeMetrics:
    """Answers by status, and how long they took. Used by one thread, the event loop's."""

    def __init__(self) -> None:
        self.answers: Counter[int] = Counter()
        self.in_flight = 0
        self.streams = 0
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._seconds = 0.0

    def answered(self, status: int, seconds: float) -> None:
        self.answers[status] += 1
        self._buckets[bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds += seconds

    def render(self, more: Mapping[str, tuple[str, float]]) -> str:
        """All figures as text; `more`: name -> (gauge or counter, value)."""
        lines = ["# TYPE earmark_requests_total counter"]
        lines += [f'earmark_requests_total{{status="{s}"}} {n}' for s, n in sorted(self.answers.items())]
        lines.append("# TYPE earmark_request_seconds histogram")
        total = 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self._buckets, strict=True):
            total += count
            lines.append(f'earmark_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"earmark_request_seconds_sum {self._seconds:.6f}", f"earmark_request_seconds_count {total}"]
        gauges = {"requests_in_flight": ("gauge", self.in_flight), "streams": ("gauge", self.streams)}
        for name, (kind, value) in {**gauges, **more}.items():
            lines += [f"# TYPE earmark_{name} {kind}", f"earmark_{name} {value}"]
        return "\n".join(lines) + "\n"
