"""The alerts of deploy/prometheus in Prometheus's own test, and its queries in its parser."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.deploy

FOLDER = ROOT / "deploy/prometheus"


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    promtool("check", "rules", str(FOLDER / "rules.yml"))
    promtool("test", "rules", str(FOLDER / "rules_test.yml"))
    tested = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    firing = {
        rule["alertname"]
        for test in tested
        for rule in test["alert_rule_test"]
        if rule.get("exp_alerts")
    }
    rules = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"][0]["rules"]
    assert firing == {rule["alert"] for rule in rules}


def test_the_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    panels = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = [
        {"record": f"query:{i}", "expr": query.replace("$__rate_interval", "5m")}
        for i, query in enumerate(queries)
    ]
    rules_file = tmp_path / "queries.yml"
    rules_file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(rules_file))
