"""Secrets of the environment stay out of what a program tells: settings, logs, status, errors."""

import logging
import os
import re

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
