"""launch/modal_serve.py deployed with the real client to a server on the loopback, and the service's command line."""

from pathlib import Path

import modal_serve
import pytest
from modal_proto import api_pb2

from tests.launch import modal_server
from tests.launch.standins import ROOT

FILE = str(ROOT / "launch" / "modal_serve.py")


def test_deploys_an_endpoint_that_grows_and_sleeps(tmp_path: Path) -> None:
    with modal_server.serving(tmp_path / "modal") as server:
        choices = {"EARMARK_RUN": "r1", "EARMARK_GLOSSARY": "terms.json", "EARMARK_SERVE_GPU": "L40S"}
        refused = modal_server.modal(server, "deploy", FILE, cwd=tmp_path, **choices)
        assert refused.returncode != 0
        assert "earmark-serve" in refused.stdout + refused.stderr, "a service without its token must not come up"

        server.secrets.add("earmark-serve")
        done = modal_server.modal(server, "deploy", FILE, cwd=tmp_path, **choices)
        assert done.returncode == 0, done.stdout + done.stderr
        serve = server.functions["fu-serve"]
        assert serve.webhook_config.type == api_pb2.WEBHOOK_TYPE_WEB_SERVER
        assert serve.webhook_config.web_server_port == modal_serve.PORT
        assert (serve.max_concurrent_inputs, serve.target_concurrent_inputs) == (64, 32)
        scaling = serve.autoscaler_settings
        assert (scaling.min_containers, scaling.max_containers, scaling.scaledown_window) == (0, 4, 300)
        assert serve.resources.gpu_config.gpu_type == "L40S"
        assert all(mount.read_only or mount.mount_path == "/cache" for mount in serve.volume_mounts)
        variables = [dict(r.env_dict) for r in server.requests["SecretGetOrCreate"] if r.env_dict]
        assert {"EARMARK_RUN": "r1", "EARMARK_GLOSSARY": "terms.json", "EARMARK_INDEX": ""} in variables
        assert server.requests["SecretGetOrCreate"][-1].deployment_name in ("", "earmark-serve")


def test_the_service_is_the_repositorys_own() -> None:
    assert modal_serve.command("r1", "terms.json", "")[1:] == [
        "/earmark/bin/serve.py", "--model", "/runs/r1", "--glossary", "/data/terms.json",
        "--host", "0.0.0.0", "--port", "8765",
    ]  # fmt: skip
    assert modal_serve.command("r1", "", "big.index")[4:6] == ["--index", "/data/big.index"]


@pytest.mark.parametrize(
    ("run", "glossary", "index", "field"),
    [("", "g", "", "EARMARK_RUN"), ("r", "", "", "EARMARK_INDEX"), ("r", "g", "i", "set one of them")],
)
def test_nothing_to_serve_names_the_variable(run: str, glossary: str, index: str, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        modal_serve.command(run, glossary, index)
