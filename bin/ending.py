"""How a program ends: its exit code, and what it says of the error that ended it."""

import os
import sys
import time
import traceback
from collections.abc import Callable

from bin.redaction import redact
from distributed.collectives import FailedOnRank0


def run_program(name: str, program: Callable[[], int | None]) -> int:
    """The exit code that `program` returns (None: 0), or that of its error, which is told. Ctrl-C ends it quietly: 130.

    What ends a program by itself (SystemExit: --help, a wrong flag) passes through.
    """
    try:
        return program() or 0
    except Exception as error:
        return tell_error(name, error)
    except KeyboardInterrupt:
        return 130


def tell_error(program: str, error: Exception) -> int:
    """Print what ended a program, and return its exit code.

    A user's error (ValueError) is one line on rank 0 and 2; anything else a traceback and 1. EARMARK_TRACEBACK=1 shows
    the traceback of both.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    is_users = isinstance(error, ValueError | FailedOnRank0)
    if not is_users or os.environ.get("EARMARK_TRACEBACK"):
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    elif is_main:
        print(f"{program}: error: {redact(str(error))}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)  # the launcher ends all ranks with the first that ends: rank 0 is to have its say
    return 2 if is_users else 1
