"""The account of what was left out: counted by reason, listed in a file, and a limit above which the run fails.

Nothing in this package skips a record, a file or a term without a line here. *Drops* are records that do not reach
training and count towards the limit; *notes* are lesser things (an unusable term, a merged duplicate) that do not.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from pathlib import Path

logger = logging.getLogger(__name__)

EXAMPLES = 3
MAX_LISTED = 100_000  # lines kept for the file; counts go on beyond it

REMEDIES = {
    "missing": "point --audio_root or --path_remap OLD=NEW at the audio",
    "outside_root": "set --audio_root to a folder that holds all of the audio",
    "outside_file": "the spans of the samples do not fit these audio files",
    "missing_field": "records need term_chunk_audio, term_chunk_text and term_chunk_audio_ground_truth_terms",
}


class DropLog:
    """Counts and lists what was dropped. Safe to share between threads."""

    def __init__(self, max_bad_fraction: float = 0.02) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.num_seen = 0
        self.counts: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.written_to: Path | None = None
        self._lines: list[dict[str, str]] = []
        self._known: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def seen(self, num_records: int = 1) -> None:
        """Count records that were looked at: what the dropped share is a share of."""
        with self._lock:
            self.num_seen += num_records

    def add(self, reason: str, source: str, detail: str = "") -> None:
        """A record is dropped. The same source dropped again for the same reason (each epoch) counts once."""
        self._record(self.counts, reason, source, detail)

    def note(self, reason: str, source: str, detail: str = "") -> None:
        """Something within a record was left out or changed; the record stays."""
        self._record(self.notes, reason, source, detail)

    def absorb(self, other: DropLog) -> None:
        """Take over another account: its counts and its list."""
        self.seen(other.num_seen)
        with self._lock:
            self.counts.update(other.counts)
            self.notes.update(other.notes)
            self._known |= other._known
            self._lines.extend(other.lines()[: MAX_LISTED - len(self._lines)])

    def _record(self, counter: Counter[str], reason: str, source: str, detail: str) -> None:
        kind = "drop" if counter is self.counts else "note"
        with self._lock:
            # A note may come several times from one record, each with its own detail.
            identity = (reason, source if kind == "drop" else f"{source} {detail}")
            if identity in self._known:
                return
            if kind == "drop" or len(self._known) < MAX_LISTED:  # notes may be as many as there are records
                self._known.add(identity)
            counter[reason] += 1
            if len(self._lines) < MAX_LISTED:
                self._lines.append({"kind": kind, "reason": reason, "source": source, "detail": detail})

    @property
    def num_dropped(self) -> int:
        return sum(self.counts.values())

    @property
    def bad_fraction(self) -> float:
        return self.num_dropped / max(1, self.num_seen)

    def over_limit(self) -> bool:
        return self.bad_fraction > self.max_bad_fraction

    def lines(self) -> list[dict[str, str]]:
        """All drops and notes listed so far, oldest first."""
        with self._lock:
            return list(self._lines)

    def write(self, path: str | Path) -> None:
        """Write the list as JSON Lines, replacing the file. A list that cannot be written is a warning."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                # ensure_ascii: bad records may hold text that UTF-8 cannot.
                file.writelines(json.dumps(line) + "\n" for line in self.lines())
        except OSError as error:
            logger.warning("the list of dropped records could not be written to %s: %s", path, error)
            return
        self.written_to = path

    def summary(self) -> str:
        """One line for the log: "12 of 3400 records dropped (missing 10, silent 2); notes: ..."."""
        text = f"{self.num_dropped} of {self.num_seen} records dropped"
        if self.counts:
            text += f" ({_by_count(self.counts)})"
        if self.notes:
            text += f"; notes: {_by_count(self.notes)}"
        if self.written_to and (self.counts or self.notes):
            text += f"; listed in {self.written_to}"
        return text

    def check(self, path: str | Path | None = None) -> None:
        """Raise ValueError when more than `max_bad_fraction` of the records is dropped; `path` is written first."""
        if path is not None:
            self.write(path)
        if not self.over_limit():
            return
        examples = "".join(
            f"\n  {line['reason']}: {line['source']} {line['detail']}"
            for line in [line for line in self.lines() if line["kind"] == "drop"][:EXAMPLES]
        )
        remedies = [REMEDIES[reason] for reason, _ in self.counts.most_common() if reason in REMEDIES][:2]
        raise ValueError(
            f"{self.summary()}: {self.bad_fraction:.1%} is more than max_bad_fraction {self.max_bad_fraction:.1%}. "
            f"For example:{examples}\nRepair the data ({'; '.join([*remedies, 'see the list'])}) "
            "or raise --max_bad_fraction"
        )


def _by_count(counter: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counter.most_common())
