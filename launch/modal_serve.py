"""An endpoint that finds terms in audio, on Modal: grows with its load and goes to sleep without it.

    modal secret create earmark-serve EARMARK_TOKEN=$(openssl rand -hex 24)
    EARMARK_RUN=my_run EARMARK_GLOSSARY=terms.json modal deploy launch/modal_serve.py
    curl -H "Authorization: Bearer $EARMARK_TOKEN" --data-binary @chunk.wav "https://...modal.run/v1/retrieve?k=5"

Serves bin/serve.py of this repository: one run of the runs volume, a glossary (EARMARK_GLOSSARY) or an index
(EARMARK_INDEX) of the data volume. EARMARK_SERVE_GPU chooses the GPU (default L4; the audio tower alone takes 1.3 GB),
EARMARK_MAX_CONTAINERS how far it grows (default 4).
"""

import os
import subprocess
import sys

import modal
import modal_setup as setup

PORT = 8765
CHOICES = ("EARMARK_RUN", "EARMARK_GLOSSARY", "EARMARK_INDEX")  # of the shell that deploys, carried into the container

app = modal.App("earmark-serve")
image = setup.build_image("serve")
gpu = os.environ.get("EARMARK_SERVE_GPU", "L4")
most = int(os.environ.get("EARMARK_MAX_CONTAINERS", "4"))
if modal.is_local():
    setup.parse_gpu(gpu)


def command(run: str, glossary: str, index: str) -> list[str]:
    """bin/serve.py's command line. Raises ValueError when there is nothing to serve."""
    if not run:
        raise ValueError("EARMARK_RUN: set it to a run of the volume when deploying (modal volume ls earmark-runs)")
    if bool(glossary) == bool(index):
        raise ValueError("EARMARK_GLOSSARY, EARMARK_INDEX: set one of them, a path on the data volume")
    terms = ["--index", f"{setup.DATA}/{index}"] if index else ["--glossary", f"{setup.DATA}/{glossary}"]
    listen = ["--host", "0.0.0.0", "--port", str(PORT)]
    return [sys.executable, f"{setup.REPO}/bin/serve.py", "--model", f"{setup.RUNS}/{run}", *terms, *listen]


@app.function(
    image=image,
    gpu=gpu,
    cpu=4,
    memory=16_384,
    volumes={**setup.VOLUMES, setup.RUNS: setup.runs_volume.read_only()},
    secrets=[modal.Secret.from_name("earmark-serve", required_keys=["EARMARK_TOKEN"])],
    env={name: os.environ.get(name, "") for name in CHOICES},
    min_containers=0,
    max_containers=most,
    scaledown_window=300,
    timeout=3600,
)
@modal.concurrent(max_inputs=64, target_inputs=32)  # bin/serve.py batches what comes in together
@modal.web_server(PORT, startup_timeout=600)
def serve() -> None:
    """Start the service; Modal passes requests on as soon as the port answers."""
    subprocess.Popen(command(*(os.environ.get(name, "") for name in CHOICES)), cwd=setup.DATA)
