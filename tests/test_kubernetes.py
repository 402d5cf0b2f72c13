"""deploy/kubernetes: what the manifests say about the command, the server and each other."""

from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from mnist import registry
from mnist.job.options import Options, make_command
from serve.app import app
from serve.settings import Settings
from tests.conftest import ROOT

FOLDER = ROOT / "deploy/kubernetes"


def read(name: str) -> dict[str, dict[str, Any]]:
    """The manifests of a file, by kind."""
    return {part["kind"]: part for part in yaml.safe_load_all((FOLDER / name).read_text())}


def test_the_probes_are_routes_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = read("serve.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    monkeypatch.setenv("MODELS", str(registry.SAMPLE))
    with TestClient(app) as client:
        for kind in ("startup", "readiness", "liveness"):
            probe = container[f"{kind}Probe"]["httpGet"]
            assert client.get(probe["path"]).status_code == 200
            assert probe["port"] == port["name"]
    assert {variable["name"].lower() for variable in container["env"]} <= {*Settings.model_fields}


def test_a_server_without_a_model_is_alive_but_not_ready(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (container,) = read("serve.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    monkeypatch.setenv("MODELS", str(tmp_path))
    with TestClient(app) as client:
        kinds = ("startup", "readiness", "liveness")
        paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in kinds]
        assert [client.get(path).status_code for path in paths] == [200, 503, 200]


def test_the_job_runs_a_command_that_parses() -> None:
    spec = read("search.yaml")["Job"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    parsed: list[Options] = []
    program, *options = [*container["command"][1:], *container["args"]]
    make_command(parsed.extend).main(options, program, standalone_mode=False)
    assert parsed[0].storage.startswith("postgresql://")
    assert "password" not in parsed[0].storage
    assert spec["parallelism"] == spec["completions"]


def test_server_and_job_share_a_volume_and_policies_choose_them() -> None:
    serve, search = read("serve.yaml"), read("search.yaml")
    claim = search["PersistentVolumeClaim"]["metadata"]["name"]
    for pod in (serve["Deployment"], search["Job"]):
        template = pod["spec"]["template"]
        claims = [v.get("persistentVolumeClaim", {}) for v in template["spec"]["volumes"]]
        assert {"claimName": claim} in claims
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        assert any(mount.get("subPath") == "saved_models" for mount in mounts)
    for manifests, kind in ((serve, "Deployment"), (search, "Job")):
        labels = manifests[kind]["spec"]["template"]["metadata"]["labels"]
        assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert serve["Service"]["spec"]["selector"] == {"app": "serve"}
