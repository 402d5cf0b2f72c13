"""deploy/kubernetes against the schemas of Kubernetes."""

import copy
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.deploy


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deploy/kubernetes").glob("*.yaml")), ids=lambda p: p.name
)
def test_a_manifest_has_only_fields_that_kubernetes_knows(path: Path) -> None:
    reason = "it is in deploy/requirements-test.txt"
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason=reason)
    version = kubernetes_validate.latest_version()
    for manifest in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(manifest, version, strict=True)
        misspelt = copy.deepcopy(manifest)
        misspelt["spec"]["replica"] = 2
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(misspelt, version, strict=True)
