"""Serve a model over HTTP: clips in, terms out, batched over requests. What is answered: see bin/service.py.

    python bin/serve.py --model runs/mine --index glossary.index
    curl -s --data-binary @chunk.wav "http://127.0.0.1:8765/v1/retrieve?k=5"

Only this machine can reach it unless --host says otherwise, which needs a token: in a file (--token_file) or in the
variable EARMARK_TOKEN, never on the command line, where other users could read it. It speaks plain HTTP: put a proxy
with TLS in front of it on any network that is not trusted. Needs the extra: bash launch/setup.sh serve
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import ipaddress
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import tyro

from bin.ending import run_program
from bin.opening import ModelFlags, SearchFlags, log_to_standard_error, open_retriever, threshold_of

logger = logging.getLogger("earmark")

MIN_TOKEN_CHARS = 16


@dataclass
class ServeLimits:
    """What one request, and all of them together, may take."""

    max_body_mb: float = 10.0
    """Larger bodies are refused (413)."""
    body_time_s: float = 10.0
    """A body must have arrived after this long (408)."""
    time_limit_s: float = 30.0
    """An answer must have been found after this long (504), and a stream must not be idle for longer."""
    max_requests: int = 64
    """Requests worked on at once; others wait for a place."""
    max_streams: int = 256
    """Live streams at once; further ones are refused."""
    max_batch: int = 64
    """Clips encoded together."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if not 0 < getattr(self, one.name) < float("inf"):
                raise ValueError(f"{one.name}: got {getattr(self, one.name)}; allowed: above 0, finite")


@dataclass
class ServeSettings:
    """Serve a model over HTTP."""

    model: tyro.conf.OmitArgPrefixes[ModelFlags]
    search: tyro.conf.OmitArgPrefixes[SearchFlags]
    limits: tyro.conf.OmitArgPrefixes[ServeLimits] = field(default_factory=ServeLimits)
    host: str = "127.0.0.1"
    """Address to listen on; anything but this machine's own needs a token."""
    port: int = 8765
    """0 takes a free one."""
    token_file: str | None = None
    """File that holds the token that requests must bear; by default the variable EARMARK_TOKEN, if it is set."""


def read_token(token_file: str | None, host: str) -> str | None:
    """The token; None where none is needed. ValueError for one that is missing, short, or cannot be read."""
    try:
        token = Path(token_file).read_text(encoding="utf-8") if token_file else os.environ.get("EARMARK_TOKEN", "")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"token_file: {token_file!r} cannot be read ({error})") from error
    token = token.strip()
    if token and len(token) < MIN_TOKEN_CHARS:
        raise ValueError(f"token: {len(token)} characters; allowed: {MIN_TOKEN_CHARS} or more (openssl rand -hex 24)")
    if token_file and not token:
        raise ValueError(f"token_file: {token_file!r} is empty")
    if not token and not _is_loopback(host):
        raise ValueError(f"host: got {host!r} without a token; set --token_file or EARMARK_TOKEN, or stay on 127.0.0.1")
    return token or None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(settings: ServeSettings) -> None:
    """The program: runs until it is stopped by a signal."""
    try:
        import uvicorn

        from bin.service import build_app
    except ImportError as error:
        raise ValueError(f"serving needs the extra: bash launch/setup.sh serve ({error})") from None
    token = read_token(settings.token_file, settings.host)
    retriever = open_retriever(settings.model, settings.search)
    app = build_app(retriever, settings.limits, threshold_of(retriever, settings.search), token)
    logger.info("serving %d terms on http://%s:%d", len(retriever.terms or ()), settings.host, settings.port)
    config = uvicorn.Config(
        app,
        settings.host,
        settings.port,
        log_level="warning",
        backlog=4096,
        ws_max_size=1 << 20,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    uvicorn.Server(config).run()


def main(argv: Sequence[str] | None = None) -> int:
    def program() -> None:
        serve(tyro.cli(ServeSettings, args=argv, use_underscores=True, prog="bin/serve.py"))

    log_to_standard_error()
    return run_program("bin/serve.py", program)


if __name__ == "__main__":
    sys.exit(main())
