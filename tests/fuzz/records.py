"""Fuzz the record parser and all importers.

    python tests/fuzz/records.py --inputs 100000                    over all targets together
    python tests/fuzz/records.py --inputs 20000 --only webdataset --seed 7

Prints a line a target and each distinct fault with its shortest input; exits with 1 when there is one. The same seed
gives the same inputs. What is read, and what counts as a fault, is told in targets.py and harness.py.
"""

import argparse
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.harness import HEADER, fuzz
from tests.fuzz.targets import targets

MEMORY_BYTES = 4 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs over all targets (default: 100000)")
    parser.add_argument("--only", default=None, help="name of the one target to fuzz")
    parser.add_argument("--seed", type=int, default=0, help="other seed, other inputs (default: 0)")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))  # an input that eats memory is a fault
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [target for target in targets(Path(folder)) if args.only in (None, target.name)]
        if not chosen:
            parser.error(f"no target {args.only!r}; there are {', '.join(t.name for t in targets(Path(folder)))}")
        print(HEADER)
        start, outcomes = time.monotonic(), []
        for number, target in enumerate(chosen):
            share = args.inputs * (number + 1) // len(chosen) - args.inputs * number // len(chosen)
            outcomes.append(fuzz(target, share, args.seed))
            print(outcomes[-1].line(), flush=True)
    num_inputs, num_faults = sum(o.num_inputs for o in outcomes), sum(o.num_faults for o in outcomes)
    print(f"{num_inputs} inputs in {time.monotonic() - start:.0f} s, {num_faults} faults")
    for outcome in outcomes:
        for what, (trace, value) in outcome.faults.items():
            print(f"\n{outcome.name}: {what}\n{trace}\n{value!r:.600}")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
