"""Secrets of the environment stay out of what a program tells: settings, logs, status, errors."""

import logging
import os
import re
import sys
import time
import traceback

from distributed.collectives import FailedOnRank0

SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; shorter ones are found in every other word


def secret_values() -> dict[str, str]:
    """value -> variable, of environment variables whose name says that they are secret."""
    return {v: k for k, v in os.environ.items() if SECRET_NAME.search(k) and len(v) >= SHORTEST}


def redact(text: str) -> str:
    """Secrets replaced by the names of their variables: an address in an error may carry a token."""
    for value, name in secret_values().items():
        text = text.replace(value, f"<{name}>")
    return text


class RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def refuse_secrets(settings: dict[str, object]) -> None:
    """ValueError for a setting that holds a secret: settings are written into the run directory."""
    for field, setting in settings.items():
        for value, name in secret_values().items():
            if value in str(setting):
                raise ValueError(f"{field} holds the value of {name}; leave it to the environment, where it is found")


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
