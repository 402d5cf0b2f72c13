"""deploy/prometheus: alerts and dashboard ask for metrics and labels that the server has."""

import json
import re

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from mnist import registry
from serve.app import app
from tests.conftest import ROOT

FOLDER = ROOT / "deploy/prometheus"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"][0]["rules"]
PANELS = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
QUERIES = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{panel['title']}, {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
}
OF_PROMETHEUS = {"up": {"job", "instance"}}  # and the label `instance` of every metric
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


@pytest.fixture(scope="module")
def text() -> str:
    """/metrics of the real server after an answer, an error, a rejection and a refused model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELS", str(registry.SAMPLE))
        with TestClient(app) as client:
            for content in ((ROOT / "docs/7.png").read_bytes(), b"no picture"):
                client.post("/predict", content=content, headers={"Content-Type": "image/png"})
            metrics = app.state.engine.metrics
            metrics.rejected.labels("queue").inc()
            metrics.refused.labels("20261130-120000").inc()
            return client.get("/metrics").text


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_asks_for_what_the_server_has(name: str, text: str) -> None:
    series = dict(OF_PROMETHEUS)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series[sample.name] = series.get(sample.name, {"instance"}) | sample.labels.keys()
    query = QUERIES[name]
    groups = {word.strip() for group in GROUPING.findall(query) for word in group.split(",")}
    bare = GROUPING.sub("", re.sub(r'"[^"]*"|\[[^]]*\]', "", query))
    metrics = {
        metric: set(re.findall(r"(\w+)\s*[=!]", labels))
        for metric, labels in re.findall(r"\b([a-z_]+)\b(?!\s*\()(\{[^}]*\}|)", bare)
        if metric not in ("and", "or", "unless", "offset")
    }
    assert metrics
    for metric, labels in metrics.items():
        assert metric in series, f"the server has no {metric}"
        assert labels <= series[metric], metric
    assert groups <= set().union(*(series[metric] for metric in metrics))


def test_the_values_of_labels_are_the_server_s(text: str) -> None:
    """Alerts compare `uncertain` and `route` with these values."""
    assert re.search(r'^predictions_total\{.*uncertain="false"', text, re.MULTILINE)
    assert re.search(r'^request_seconds_bucket\{.*route="/predict"', text, re.MULTILINE)
