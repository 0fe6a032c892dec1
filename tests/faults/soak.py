"""Every fault, again and again: what was tried, survived, came out equal bit for bit, and left nothing behind.

    python tests/faults/soak.py --rounds 20                 the whole table; ends with 1 when anything failed
    python tests/faults/soak.py --rounds 3 --only torchrun  the rows whose name holds the word
    python tests/faults/soak.py --ranks 8 --gpus --only rank     NCCL, a GPU a rank; without --gpus gloo on the CPU

Each row runs the real bin/train.py on 2 gloo ranks over tones, disturbs it, resumes it, and compares the trained files
with those of an undisturbed run; on GPUs, whose sums come in any order, nothing is compared.
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

from tests.faults.cases import TABLE  # noqa: E402
from tests.faults.job import Workshop  # noqa: E402
from tests.faults.outcome import Outcome, Row, Skipped  # noqa: E402


def attempt(row: Row, shop: Workshop, number: int, seed: int) -> Outcome | str:
    """The outcome; or why the fault cannot be made here."""
    name = "".join(c if c.isalnum() else "-" for c in row.name) + f"-{number}"
    try:
        return row.case(shop, name, random.Random(f"{row.name} {seed} {number}"))
    except Skipped as skipped:
        return str(skipped)
    except Exception:
        return Outcome(False, None, [], traceback.format_exc())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of the rows that leave something to chance")
    parser.add_argument("--all_rows", action="store_true", help="repeat the other rows as often, too")
    parser.add_argument("--only", default="", help="a word in the names of the rows to run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ranks", type=int, default=2, help="processes of a run, 2 or more")
    parser.add_argument("--gpus", action="store_true", help="on as many GPUs, with NCCL")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks {arguments.ranks}; allowed: 2 or more")
    print(f"{'fault':46s} tried survived equal clean  seconds")
    failed = []
    with tempfile.TemporaryDirectory(prefix="earmark-faults-") as folder:
        shop = Workshop(Path(folder), arguments.ranks, "cuda" if arguments.gpus else "cpu")
        for row in [r for r in TABLE if arguments.only in r.name]:
            outcomes: list[Outcome] = []
            skipped, started = "", time.monotonic()
            for number in range(arguments.rounds if row.every_round or arguments.all_rows else 1):
                outcome = attempt(row, shop, number, arguments.seed)
                if isinstance(outcome, str):
                    skipped = outcome
                    break
                if arguments.gpus:
                    outcome.equal = None
                outcomes.append(outcome)
                if not outcome.is_good:
                    failed.append(f"{row.name}, round {number}: {outcome}")
            comparable = [o.equal for o in outcomes if o.equal is not None]
            survived, clean = sum(o.survived for o in outcomes), sum(not o.leftovers for o in outcomes)
            equal = f"{sum(comparable)}/{len(comparable)}" if comparable else "-"
            seconds = time.monotonic() - started
            note = f"skipped: {skipped}" if skipped else "; ".join(dict.fromkeys(o.note for o in outcomes[:2]))[:150]
            counts = f"{len(outcomes):5d} {survived:8d} {equal:>5s} {clean:5d} {seconds:8.1f}"
            print(f"{row.name:46s} {counts}  {note}", flush=True)
        shop.nursery.close()
    for line in failed:
        print(f"\nFAILED {line}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
