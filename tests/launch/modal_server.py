"""A server on the loopback that speaks enough of Modal's protocol for its real client and its container entrypoint.

It records every request, keeps files by content as Modal does, and runs a called function in a process of its own: a
folder is filled with what the client uploaded, volumes are folders, and Modal's own `_container_entrypoint` fetches the
input, runs the function and puts the result. No account, no network beyond 127.0.0.1, no GPU.
"""

import asyncio
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import grpclib.server
from google.protobuf.empty_pb2 import Empty
from modal._utils.grpc_testing import patch_mock_servicer
from modal_proto import api_pb2
from modal_proto.api_grpc import ModalClientBase

CONTAINER = Path(__file__).with_name("modal_container.py")
SUCCESS = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)


@patch_mock_servicer
class ModalServer(ModalClientBase):
    """One workspace with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url, self.files_url = folder, "", ""
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.blobs: dict[str, bytes] = {}
        self.mounts: dict[str, list[api_pb2.MountFile]] = {}
        self.volumes: dict[str, str] = {}  # name -> id
        self.secrets: set[str] = set()  # names that exist
        self.functions: dict[str, api_pb2.Function] = {}
        self.metadata: dict[str, api_pb2.FunctionHandleMetadata] = {}
        self.image_layers: list[Any] = []
        self.calls: dict[str, tuple[str, api_pb2.FunctionInput]] = {}
        self.outputs: dict[str, api_pb2.FunctionPutOutputsItem] = {}
        self.container_logs: list[str] = []
        self.commits: list[str] = []
        self.container_environment: dict[str, str] = {}
        self.refuse_put = 0  # the number of the VolumePutFiles that fails; 0 for none

    async def _receive(self, name: str, stream: Any) -> Any:
        message = await stream.recv_message()
        self.requests[name].append(message)
        return message

    def volume_folder(self, name_or_id: str) -> Path:
        name = next((n for n, i in self.volumes.items() if i == name_or_id), name_or_id)
        folder = self.folder / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # ------------------------------------------------------------------------------------------ session, app and image

    async def ClientHello(self, stream: Any) -> None:
        await self._receive("ClientHello", stream)
        await stream.send_message(api_pb2.ClientHelloResponse())

    async def AuthTokenGet(self, stream: Any) -> None:
        await self._receive("AuthTokenGet", stream)
        # A JWT without a signature whose "exp" is far away: the client only reads that.
        await stream.send_message(api_pb2.AuthTokenGetResponse(token="e30.eyJleHAiOjQwMDAwMDAwMDB9.x"))

    async def EnvironmentGetOrCreate(self, stream: Any) -> None:
        await self._receive("EnvironmentGetOrCreate", stream)
        settings = api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
        await stream.send_message(api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata))

    async def AppCreate(self, stream: Any) -> None:
        await self._receive("AppCreate", stream)
        await stream.send_message(api_pb2.AppCreateResponse(app_id="ap-1", app_page_url="http://none"))

    async def AppGetByDeploymentName(self, stream: Any) -> None:
        await self._receive("AppGetByDeploymentName", stream)
        await stream.send_message(api_pb2.AppGetByDeploymentNameResponse())

    async def AppHeartbeat(self, stream: Any) -> None:
        await self._receive("AppHeartbeat", stream)
        await stream.send_message(Empty())

    async def AppGetLogs(self, stream: Any) -> None:
        request = await self._receive("AppGetLogs", stream)
        await asyncio.sleep(min(1.0, request.timeout))
        if self.requests["AppClientDisconnect"]:
            await stream.send_message(api_pb2.TaskLogsBatch(app_done=True))

    async def AppPublish(self, stream: Any) -> None:
        await self._receive("AppPublish", stream)
        await stream.send_message(api_pb2.AppPublishResponse(url="http://none"))

    async def AppClientDisconnect(self, stream: Any) -> None:
        await self._receive("AppClientDisconnect", stream)
        await stream.send_message(Empty())

    async def ImageGetOrCreate(self, stream: Any) -> None:
        request = await self._receive("ImageGetOrCreate", stream)
        self.image_layers.append(request.image)
        metadata = api_pb2.ImageMetadata(image_builder_version="2025.06")
        number = hashlib.sha256(request.image.SerializeToString(deterministic=True)).hexdigest()[:12]
        await stream.send_message(
            api_pb2.ImageGetOrCreateResponse(image_id=f"im-{number}", result=SUCCESS, metadata=metadata)
        )

    # ------------------------------------------------------------------------------------------------ files by content

    async def MountBatchedCheckExistence(self, stream: Any) -> None:
        request = await self._receive("MountBatchedCheckExistence", stream)
        missing = [h for h in request.sha256_hex_hashes if h not in self.blobs]
        await stream.send_message(api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing))

    async def MountPutFile(self, stream: Any) -> None:
        request = await stream.recv_message()
        if request.WhichOneof("data_oneof") == "data":
            assert hashlib.sha256(request.data).hexdigest() == request.sha256_hex
            self.blobs[request.sha256_hex] = request.data
            self.requests["MountPutFile"].append(request)
        await stream.send_message(api_pb2.MountPutFileResponse(exists=request.sha256_hex in self.blobs))

    async def MountGetOrCreate(self, stream: Any) -> None:
        request = await self._receive("MountGetOrCreate", stream)
        mount_id = f"mo-{len(self.mounts)}"
        self.mounts[mount_id] = list(request.files)
        await stream.send_message(api_pb2.MountGetOrCreateResponse(mount_id=mount_id))

    async def VolumeGetOrCreate(self, stream: Any) -> None:
        request = await self._receive("VolumeGetOrCreate", stream)
        volume_id = self.volumes.setdefault(request.deployment_name, f"vo-{len(self.volumes)}")
        self.volume_folder(request.deployment_name)
        metadata = api_pb2.VolumeMetadata(version=api_pb2.VOLUME_FS_VERSION_V1, name=request.deployment_name)
        await stream.send_message(api_pb2.VolumeGetOrCreateResponse(volume_id=volume_id, metadata=metadata))

    async def VolumePutFiles(self, stream: Any) -> None:
        request = await self._receive("VolumePutFiles", stream)
        if len(self.requests["VolumePutFiles"]) == self.refuse_put:
            raise grpclib.GRPCError(grpclib.Status.FAILED_PRECONDITION, "the line is dead")
        for file in request.files:
            place = self.volume_folder(request.volume_id) / file.filename.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(self.blobs[file.sha256_hex])
        await stream.send_message(Empty())

    async def VolumeListFiles(self, stream: Any) -> None:
        request = await self._receive("VolumeListFiles", stream)
        root = self.volume_folder(request.volume_id)
        start = root / request.path.lstrip("/")
        if not start.exists():
            raise grpclib.GRPCError(grpclib.Status.NOT_FOUND, "no such path")
        kinds = {True: api_pb2.FileEntry.DIRECTORY, False: api_pb2.FileEntry.FILE}
        entries = [
            api_pb2.FileEntry(
                path=p.relative_to(root).as_posix(),
                type=kinds[p.is_dir()],
                mtime=int(p.stat().st_mtime),
                size=p.stat().st_size,
            )
            for p in sorted(start.rglob("*"))
        ]
        await stream.send_message(api_pb2.VolumeListFilesResponse(entries=entries))

    async def VolumeGetFile2(self, stream: Any) -> None:
        request = await self._receive("VolumeGetFile2", stream)
        file = self.volume_folder(request.volume_id) / request.path.lstrip("/")
        if not file.is_file():
            raise grpclib.GRPCError(grpclib.Status.NOT_FOUND, "no such file")
        size = file.stat().st_size
        urls = [f"{self.files_url}{quote(str(file))}"] if size else []
        await stream.send_message(api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=0, len=size))

    async def VolumeCommit(self, stream: Any) -> None:
        request = await self._receive("VolumeCommit", stream)
        self.commits.append(next(n for n, i in self.volumes.items() if i == request.volume_id))
        await stream.send_message(api_pb2.VolumeCommitResponse())

    async def VolumeReload(self, stream: Any) -> None:
        await self._receive("VolumeReload", stream)
        await stream.send_message(Empty())

    async def SecretGetOrCreate(self, stream: Any) -> None:
        request = await self._receive("SecretGetOrCreate", stream)
        if request.deployment_name and request.deployment_name not in self.secrets:
            raise grpclib.GRPCError(grpclib.Status.NOT_FOUND, f"Secret '{request.deployment_name}' not found")
        await stream.send_message(api_pb2.SecretGetOrCreateResponse(secret_id=f"st-{request.deployment_name}"))

    # ------------------------------------------------------------------------------------------------------- functions

    async def FunctionPrecreate(self, stream: Any) -> None:
        request = await self._receive("FunctionPrecreate", stream)
        function_id = f"fu-{request.function_name}"
        self.metadata[function_id] = api_pb2.FunctionHandleMetadata(
            function_name=request.function_name,
            function_type=request.function_type,
            function_schema=request.function_schema,
            max_object_size_bytes=1 << 20,
            max_async_object_size_bytes=1 << 20,
        )
        response = api_pb2.FunctionPrecreateResponse(
            function_id=function_id, handle_metadata=self.metadata[function_id]
        )
        await stream.send_message(response)

    async def FunctionCreate(self, stream: Any) -> None:
        request = await self._receive("FunctionCreate", stream)
        function_id = f"fu-{request.function.function_name}"
        self.functions[function_id] = request.function
        ranked = api_pb2.FunctionData.RankedFunction(rank=0, function=request.function)
        await stream.send_message(
            api_pb2.FunctionCreateResponse(
                function_id=function_id,
                function=request.function,
                function_data=api_pb2.FunctionData(ranked_functions=[ranked]),
                handle_metadata=self.metadata[function_id],
            )
        )

    async def FunctionBindParams(self, stream: Any) -> None:
        request = await self._receive("FunctionBindParams", stream)
        await stream.send_message(
            api_pb2.FunctionBindParamsResponse(
                bound_function_id=request.function_id, handle_metadata=self.metadata[request.function_id]
            )
        )

    async def FunctionMap(self, stream: Any) -> None:
        request = await self._receive("FunctionMap", stream)
        number = len(self.calls)
        call_id, (item,) = f"fc-{number}", request.pipelined_inputs
        self.calls[call_id] = (request.function_id, item.input)
        accepted = api_pb2.FunctionPutInputsResponseItem(idx=0, input_id=f"in-{number}", input_jwt="jwt")
        await stream.send_message(
            api_pb2.FunctionMapResponse(
                function_call_id=call_id,
                pipelined_inputs=[accepted],
                retry_policy=self.functions[request.function_id].retry_policy,
                function_call_jwt="jwt",
            )
        )

    async def FunctionGetOutputs(self, stream: Any) -> None:
        request = await self._receive("FunctionGetOutputs", stream)
        call_id = request.function_call_id
        retries = self.functions[self.calls[call_id][0]].retry_policy.retries
        while call_id not in self.outputs:
            await self._run_container(call_id)
            output = self.outputs.get(call_id)
            if output is None or output.result.status != api_pb2.GenericResult.GENERIC_STATUS_SUCCESS:
                if not retries:
                    break
                retries -= 1
                self.outputs.pop(call_id, None)
        output = self.outputs[call_id]
        item = api_pb2.FunctionGetOutputsItem(result=output.result, idx=0, data_format=output.data_format)
        await stream.send_message(api_pb2.FunctionGetOutputsResponse(outputs=[item], idxs=[0]))

    async def _run_container(self, call_id: str) -> None:
        """Build the container's files, start Modal's entrypoint in it, wait."""
        function_id, _ = self.calls[call_id]
        definition = self.functions[function_id]
        number = len(self.container_logs)
        root = self.folder / f"container-{number}"
        for mount_id in definition.mount_ids:
            for file in self.mounts[mount_id]:
                place = root / file.filename.lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(self.blobs[file.sha256_hex])
        for mount in definition.volume_mounts:
            (root / mount.mount_path.lstrip("/")).symlink_to(self.volume_folder(mount.volume_id))
        objects = [api_pb2.Object(object_id=i, function_handle_metadata=m) for i, m in self.metadata.items()]
        objects += [
            api_pb2.Object(object_id=i, volume_metadata=api_pb2.VolumeMetadata(version=1, name=n))
            for n, i in self.volumes.items()
        ]
        objects += [api_pb2.Object(object_id=definition.image_id)]
        objects += [api_pb2.Object(object_id=m) for m in self.mounts]
        arguments = api_pb2.ContainerArguments(
            task_id=f"ta-{call_id}",
            function_id=function_id,
            app_id="ap-1",
            function_def=definition,
            environment_name="main",
            app_layout=api_pb2.AppLayout(
                objects=objects, function_ids={m.function_name: i for i, m in self.metadata.items()}
            ),
        )
        (root / "arguments").write_bytes(arguments.SerializeToString())
        environment = {
            **os.environ,
            **self.container_environment,
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(root / "arguments"),
            "MODAL_IS_REMOTE": "1",
            "MODAL_SERVER_URL": self.url,
            "CONTAINER_ROOT": str(root),
        }
        log = root / "log"
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(CONTAINER), env=environment, cwd=root, stdout=out, stderr=out
            )
            await process.wait()
        self.container_logs.append(log.read_text(errors="replace"))

    # ------------------------------------------------------------------------------------- as seen from the container

    async def ContainerHello(self, stream: Any) -> None:
        await self._receive("ContainerHello", stream)
        await stream.send_message(Empty())

    async def ContainerHeartbeat(self, stream: Any) -> None:
        await self._receive("ContainerHeartbeat", stream)
        await stream.send_message(api_pb2.ContainerHeartbeatResponse())

    async def FunctionGetInputs(self, stream: Any) -> None:
        request = await self._receive("FunctionGetInputs", stream)
        call_id = next(c for c, (f, _) in self.calls.items() if f == request.function_id and c not in self.outputs)
        payload = self.calls[call_id][1]
        payload.final_input = True
        item = api_pb2.FunctionGetInputsItem(
            input_id=call_id.replace("fc", "in"), function_call_id=call_id, input=payload
        )
        await stream.send_message(api_pb2.FunctionGetInputsResponse(inputs=[item]))

    async def FunctionPutOutputs(self, stream: Any) -> None:
        request = await self._receive("FunctionPutOutputs", stream)
        for output in request.outputs:
            self.outputs[output.input_id.replace("in", "fc")] = output
        await stream.send_message(Empty())

    async def TaskResult(self, stream: Any) -> None:
        await self._receive("TaskResult", stream)
        await stream.send_message(Empty())


class Blocks(http.server.SimpleHTTPRequestHandler):
    """Volume blocks, which Modal's client fetches over HTTP."""

    def do_GET(self) -> None:
        content = Path(unquote(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[ModalServer]:
    """The server on free ports of 127.0.0.1, in a thread of its own, until the block ends."""
    server, loop, ready = ModalServer(folder), asyncio.new_event_loop(), threading.Event()
    blocks = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blocks)
    server.files_url = f"http://127.0.0.1:{blocks.server_port}"
    threading.Thread(target=blocks.serve_forever, daemon=True).start()
    grpc = None

    async def start() -> None:
        nonlocal grpc
        grpc = grpclib.server.Server([server])
        await grpc.start("127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{grpc._server.sockets[0].getsockname()[1]}"
        ready.set()

    async def stop() -> None:
        assert grpc is not None
        grpc.close()
        await grpc.wait_closed()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop)
    assert ready.wait(20)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        blocks.shutdown()
        blocks.server_close()


def modal(server: ModalServer, *words: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """The real command-line program `modal`, pointed at the server."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MODAL_", "EARMARK_"))}
    environment |= {
        "MODAL_SERVER_URL": server.url,
        "MODAL_CONFIG_PATH": str(server.folder / "no-config.toml"),
        "MODAL_TOKEN_ID": "ak-test",
        "MODAL_TOKEN_SECRET": "as-test",
        **extra,
    }
    return subprocess.run(
        [sys.executable, "-m", "modal", *words],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
