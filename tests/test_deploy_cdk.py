"""deploy/cdk/: both stacks are synthesised, without an account and without Docker."""

import json
import shutil
import subprocess
from filecmp import cmpfiles
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.filterwarnings("default"),  # of jsii, on which the CDK stands
]


def import_cdk() -> Any:
    """The module app of deploy/cdk/."""
    pytest.importorskip("aws_cdk", reason="it is in deploy/cdk/requirements.txt")
    if shutil.which("node") is None:
        pytest.skip("node is not installed; the CDK needs it")
    from deploy.cdk import app

    return app


@pytest.fixture(scope="module")
def synthesised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The output folder, and the templates of the function and of the service."""
    folder = tmp_path_factory.mktemp("cdk")
    context = {"provisioned": "2", "api-keys": "server-keys"}
    app = import_cdk().make_app(outdir=str(folder), context=context)
    app.synth()
    from aws_cdk.assertions import Template

    stacks = [app.node.find_child(name) for name in ("DigitsFunction", "DigitsService")]
    return folder, *map(Template.from_stack, stacks)


Synthesised = tuple[Path, Any, Any]


def test_the_function_has_a_url_and_warm_instances(synthesised: Synthesised) -> None:
    template = synthesised[1]
    properties = {"PackageType": "Image", "MemorySize": 1769, "Timeout": 30}
    template.has_resource_properties("AWS::Lambda::Function", properties)
    template.resource_count_is("AWS::Lambda::Url", 1)
    warm = {"ProvisionedConcurrencyConfig": {"ProvisionedConcurrentExecutions": 2}}
    template.has_resource_properties("AWS::Lambda::Alias", {"Name": "live", **warm})
    keys = "{{resolve:secretsmanager:server-keys}}"
    environment = {"Environment": {"Variables": {"API_KEYS": keys}}}
    template.has_resource_properties("AWS::Lambda::Function", environment)
    # An old version stays, for the alias to return to.
    template.has_resource("AWS::Lambda::Version", {"DeletionPolicy": "Retain"})
    template.resource_count_is("AWS::CloudWatch::Alarm", 2)


def test_the_service_is_replaced_without_a_gap_and_grows(synthesised: Synthesised) -> None:
    template = synthesised[2]
    deployment = {
        "MinimumHealthyPercent": 100,
        "MaximumPercent": 200,
        "DeploymentCircuitBreaker": {"Enable": True, "Rollback": True},
    }
    properties = {"LaunchType": "FARGATE", "DesiredCount": 2, "DeploymentConfiguration": deployment}
    template.has_resource_properties("AWS::ECS::Service", properties)
    ready = {"HealthCheckPath": "/ready", "HealthyThresholdCount": 2}
    template.has_resource_properties("AWS::ElasticLoadBalancingV2::TargetGroup", ready)
    limits = {"MinCapacity": 2, "MaxCapacity": 10}
    template.has_resource_properties("AWS::ApplicationAutoScaling::ScalableTarget", limits)
    template.resource_count_is("AWS::CloudWatch::Alarm", 3)
    template.resource_count_is("AWS::EC2::NatGateway", 0)
    (task,) = template.find_resources("AWS::ECS::TaskDefinition").values()
    (container,) = task["Properties"]["ContainerDefinitions"]
    assert container["ReadonlyRootFilesystem"] is True
    assert [secret["Name"] for secret in container["Secrets"]] == ["API_KEYS"]


def test_the_service_speaks_https_with_a_certificate(tmp_path: Path) -> None:
    arn = "arn:aws:acm:eu-west-1:123456789012:certificate/1"
    app = import_cdk().make_app(outdir=str(tmp_path), context={"certificate": arn})
    from aws_cdk.assertions import Annotations, Match, Template

    service = app.node.find_child("DigitsService")
    listener = "AWS::ElasticLoadBalancingV2::Listener"
    template = Template.from_stack(service)
    https = {"Protocol": "HTTPS", "Certificates": [{"CertificateArn": arn}]}
    template.has_resource_properties(listener, https)
    redirect = {"Port": 80, "DefaultActions": [Match.object_like({"Type": "redirect"})]}
    template.has_resource_properties(listener, redirect)
    Annotations.from_stack(service).has_no_warning("*", Match.any_value())


@pytest.mark.parametrize(("stack", "target"), [("Function", "lambda"), ("Service", "serve")])
def test_the_image_is_built_as_the_tested_one(
    stack: str, target: str, synthesised: Synthesised
) -> None:
    folder = synthesised[0]
    manifest = json.loads((folder / f"Digits{stack}.assets.json").read_text())
    (image,) = manifest["dockerImages"].values()
    source = image["source"]
    assert (source["dockerFile"], source["dockerBuildTarget"]) == ("deploy/Dockerfile", target)
    assert source["dockerBuildArgs"] == {"MODELS": "serve/sample_model"}
    context = folder / source["directory"]
    files = [str(path.relative_to(context)) for path in context.rglob("*") if path.is_file()]
    assert {"serve/app.py", "deploy/lambda/handler.py", "requirements-serve.txt"} <= {*files}
    assert not any(name.endswith((".pyc", ".pth")) or "tests" in name for name in files)
    assert sorted(cmpfiles(context, ROOT, files, shallow=False)[0]) == sorted(files)


def test_cfn_lint_finds_no_fault(synthesised: Synthesised) -> None:
    if shutil.which("cfn-lint") is None:
        pytest.skip("cfn-lint is not installed; it is in deploy/requirements-test.txt")
    templates = [*synthesised[0].glob("*.template.json")]
    assert len(templates) == 2
    # The CDK adds dependencies that are implied already (W3005).
    command = ["cfn-lint", "--regions", "eu-west-1", "--ignore-checks", "W3005", "--"]
    command += map(str, templates)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"models": "no-such-folder"}, "models=no-such-folder: no model_info.json there"),
        ({"provisioned": "some"}, "provisioned=some: it must be a whole number"),
    ],
)
def test_a_wrong_context_value_is_refused_in_one_line(
    context: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        import_cdk().make_app(outdir=str(tmp_path), context=context)
