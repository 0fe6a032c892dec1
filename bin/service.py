"""The HTTP service: what it answers, and what it refuses.

    POST /v1/retrieve?k=10&threshold=0.3             body: a WAV, FLAC, Ogg or MP3 file of up to 30 s
    POST /v1/retrieve?format=pcm&sample_rate=16000   body: raw 16-bit little-endian mono samples
        200 {"duration_s": 1.5, "matches": [{"score", "term", "surface", "translations", "start_s", "end_s"}, ...]}
        400 samples that are none   401 wrong token   408 body too slow   413 body too large   422 not audio, wrong k
        503 too busy, come again    504 took too long           each {"error": "..."}
    WS   /v1/stream?k=10&threshold=0.3&sample_rate=16000    binary messages: raw samples, as many as there are
        after each message that completes a window: {"end_s": 3.84, "matches": [...]}; the text "finish" ends it
    GET  /healthz    200 with no token        GET /metrics    Prometheus' text

A request waits for a place before its body is read, so the bodies in memory are bounded by places x size. Nothing of a
request outlives it.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from bin.batcher import Batcher, Busy
from bin.serve import ServeLimits
from bin.servemetrics import ServeMetrics
from data.audio import MAX_CLIP_S, SAMPLE_RATE, AudioError, read_bytes
from retrieval.matches import Match
from retrieval.pcm import to_pcm
from retrieval.retriever import Retriever
from retrieval.stream import Stream

logger = logging.getLogger(__name__)

DECODERS = 4
"""Bodies that are decoded at once."""
MAX_K = 1000
CLIENT_CLOSED = 499  # nginx's number for a client that left; it is only counted


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Service:
    """The state behind the routes."""

    def __init__(self, retriever: Retriever, limits: ServeLimits, threshold: float | None, token: str | None) -> None:
        self.retriever, self.limits, self.threshold, self.token = retriever, limits, threshold, token
        retriever.stream()  # windows are prepared for, before another thread has the model
        self.batcher = Batcher(retriever, limits.max_batch)
        self.metrics = ServeMetrics()
        self.places = asyncio.Semaphore(limits.max_requests)
        self.decoders = asyncio.Semaphore(DECODERS)

    def check_token(self, authorization: str | None) -> None:
        if self.token is None:
            return
        given = (authorization or "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise Refusal(401, "wrong or no token; send Authorization: Bearer <token>")

    async def retrieve(self, request: Request, k: int, threshold: float | None, decode: Callable) -> dict[str, Any]:
        """Read the body, decode it, find its terms. Raises Refusal."""
        self.check_token(request.headers.get("authorization"))
        max_bytes = int(self.limits.max_body_mb * 1e6)
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > max_bytes:
            raise Refusal(413, f"the body has {declared} bytes; allowed: {max_bytes}")
        try:
            async with asyncio.timeout(self.limits.time_limit_s):
                async with self.places:
                    pcm_S = await self._decoded(await self._body(request, max_bytes), decode)
                    matches = self.retriever.matches(
                        await asyncio.wrap_future(self.batcher.submit(pcm_S, k)), threshold
                    )
        except TimeoutError:
            raise Refusal(504, f"no answer within {self.limits.time_limit_s:g} s; come again later") from None
        except Busy as error:
            raise Refusal(503, f"too busy: {error}; come again later") from None
        return {"duration_s": round(len(pcm_S) / SAMPLE_RATE, 4), "matches": [vars(match) for match in matches]}

    async def _body(self, request: Request, max_bytes: int) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_time_s):
                async for part in request.stream():
                    body += part
                    if len(body) > max_bytes:
                        raise Refusal(413, f"the body has more than {max_bytes} bytes, which is what is allowed")
        except TimeoutError:
            raise Refusal(
                408, f"{len(body)} bytes of the body after {self.limits.body_time_s:g} s; send it faster"
            ) from None
        return bytes(body)

    async def _decoded(self, body: bytes, decode: Callable[[bytes], NDArray[np.int16]]) -> NDArray[np.int16]:
        async with self.decoders:
            try:
                return await asyncio.to_thread(decode, body)
            except AudioError as error:
                raise Refusal(422, str(error)) from None
            except ValueError as error:
                raise Refusal(400, str(error)) from None

    async def follow(self, socket: WebSocket, stream: Stream) -> None:
        """Serve one live stream until its client leaves. Raises Refusal."""
        while True:
            try:
                async with asyncio.timeout(self.limits.time_limit_s):
                    message = await socket.receive()
            except TimeoutError:
                raise Refusal(408, f"nothing came for {self.limits.time_limit_s:g} s") from None
            if message["type"] == "websocket.disconnect":
                return
            raw = message.get("bytes")
            try:
                if raw is not None:
                    stream.feed(as_samples(raw))
                elif message.get("text") != "finish":
                    raise Refusal(400, "allowed are binary messages of samples, and the text finish")
                due = stream.take_due() if raw is not None else stream.take_rest()
            except ValueError as error:
                raise Refusal(400, str(error)) from None
            futures = [None if w.is_silent else self.batcher.submit(w.pcm_S, stream.settings.k) for w in due]
            for window, future in zip(due, futures, strict=True):
                if future is None:
                    stream.add(window, None)
                else:
                    hits = await asyncio.wrap_future(future)
                    stream.add(window, hits)
            if due or raw is None:
                await socket.send_text(json.dumps({"end_s": stream.end_s, "matches": as_dicts(stream.query())}))
            if raw is None:
                await socket.close()
                return

    def text(self) -> str:
        counters = {
            "batches_total": ("counter", self.batcher.num_batches),
            "clips_total": ("counter", self.batcher.num_clips),
        }
        return self.metrics.render({**counters, "clips_waiting": ("gauge", self.batcher.num_waiting)})


def as_samples(raw: bytes, sample_rate: int | None = None) -> NDArray[np.int16]:
    """Raw 16-bit samples; with a rate, as a clip of 16 kHz. ValueError for half a sample or a length no clip has."""
    if len(raw) % 2:
        raise ValueError(f"{len(raw)} bytes; allowed: whole 16-bit samples")
    samples_S = np.frombuffer(raw, dtype="<i2").astype(np.int16)
    return samples_S if sample_rate is None else to_pcm(samples_S, sample_rate, "body")


def as_dicts(matches: list[Match]) -> list[dict[str, Any]]:
    return [vars(match) for match in matches]


def build_app(retriever: Retriever, limits: ServeLimits, threshold: float | None, token: str | None) -> FastAPI:
    """The application over a retriever with an index in use, which it alone may use from now on.

    threshold: least cosine where a request names none. token: None lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    service = Service(retriever, limits, threshold, token)
    app = FastAPI(title="Earmark", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service = service

    @app.middleware("http")
    async def account(request: Request, call_next: Callable) -> Response:
        started, service.metrics.in_flight = time.perf_counter(), service.metrics.in_flight + 1
        status = 500
        try:
            response: Response = await call_next(request)
            status = response.status_code
            return response
        finally:
            service.metrics.in_flight -= 1
            if request.url.path.startswith("/v1/"):
                service.metrics.answered(status, time.perf_counter() - started)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        headers = {"Retry-After": "1"} if refusal.status == 503 else {}
        if refusal.status in (401, 408, 413):
            headers["Connection"] = "close"  # the rest of the body is not read
        return JSONResponse({"error": refusal.message}, refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
        return JSONResponse({"error": told}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok", "num_terms": len(retriever.terms or ()), "model": retriever.fingerprint})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.check_token(request.headers.get("authorization"))
        return PlainTextResponse(service.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/retrieve")
    async def retrieve(
        request: Request,
        k: Annotated[int, Query(ge=1, le=MAX_K)] = 10,
        threshold: Annotated[float | None, Query(ge=-1, le=1)] = None,
        format: Annotated[str, Query(pattern="^(file|pcm)$")] = "file",
        sample_rate: int = SAMPLE_RATE,
    ) -> Response:
        def decode(body: bytes) -> NDArray[np.int16]:
            return as_samples(body, sample_rate) if format == "pcm" else read_bytes(body, MAX_CLIP_S)

        found = await service.retrieve(request, k, service.threshold if threshold is None else threshold, decode)
        return JSONResponse(found)

    @app.websocket("/v1/stream")
    async def follow(
        socket: WebSocket, k: int = 10, threshold: float | None = None, sample_rate: int = SAMPLE_RATE
    ) -> None:
        await socket.accept()
        service.metrics.streams += 1
        try:
            service.check_token(socket.headers.get("authorization"))
            if service.metrics.streams > limits.max_streams:
                raise Refusal(503, f"{limits.max_streams} streams are live; come again later")
            if k > MAX_K:
                raise Refusal(422, f"k: got {k}; allowed: 1 to {MAX_K}")
            least = service.threshold if threshold is None else threshold
            stream = retriever.stream(k=k, threshold=least, sample_rate=sample_rate)
            await service.follow(socket, stream)
        except WebSocketDisconnect:
            pass
        except (Refusal, Busy, ValueError) as error:
            await socket.send_text(json.dumps({"error": str(error)}))
            await socket.close(1008)
        finally:
            service.metrics.streams -= 1

    return app
