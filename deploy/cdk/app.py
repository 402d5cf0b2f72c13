"""Two ways to run the server on AWS: a Lambda function with a URL, or ECS behind a load balancer.

`npx --yes aws-cdk@2 synth` in this folder. Context values (`-c NAME=VALUE`): `models`, the folder
of models in the image; `api-keys`, the name of the secret with API_KEYS; `provisioned`, the number
of Lambda instances that are always warm; `certificate`, the ARN of the load balancer's certificate.
"""

from pathlib import Path
from typing import Any

from aws_cdk import Annotations, App, CfnOutput, Duration, RemovalPolicy, Stack
from aws_cdk import aws_certificatemanager as certificates
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as actions
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecr_assets as assets
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_ecs_patterns as patterns
from aws_cdk import aws_elasticloadbalancingv2 as balancing
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_logs as logs
from aws_cdk import aws_secretsmanager as secrets
from aws_cdk import aws_sns as sns
from constructs import Construct

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = "serve/sample_model"


class FunctionStack(Stack):
    """The server as a Lambda function with a public URL; it costs nothing without requests.

    Each deployment publishes a version, to which the alias `live` points.
    """

    def __init__(self, scope: Construct, name: str) -> None:
        super().__init__(scope, name)
        secret, provisioned = self.node.try_get_context("api-keys"), _read_provisioned(self)
        # Lambda has no reference to a secret: the deployment resolves it into the environment.
        keys = {"API_KEYS": f"{{{{resolve:secretsmanager:{secret}}}}}"} if secret else {}
        function = lambda_.DockerImageFunction(
            self,
            "Server",
            code=lambda_.DockerImageCode.from_image_asset(str(ROOT), **_image(self, "lambda")),
            memory_size=1769,  # MB: one whole core; less memory is a smaller share of it
            timeout=Duration.seconds(30),
            environment=keys,
            log_group=_make_logs(self),
            current_version_options=lambda_.VersionOptions(removal_policy=RemovalPolicy.RETAIN),
        )
        live = function.add_alias("live", provisioned_concurrent_executions=provisioned)
        url = live.add_function_url(auth_type=lambda_.FunctionUrlAuthType.NONE)
        _alarm(
            self,
            {
                "Errors": (live.metric_errors(period=Duration.minutes(5)), 1),
                "Throttles": (live.metric_throttles(period=Duration.minutes(5)), 1),
            },
        )
        CfnOutput(self, "Url", value=url.url)


class ServiceStack(Stack):
    """The server as 2 to 10 tasks of ECS on Fargate behind a load balancer.

    A deployment starts new tasks beside the old ones, and is rolled back if /ready stays unready.
    """

    def __init__(self, scope: Construct, name: str) -> None:
        super().__init__(scope, name)
        arn = self.node.try_get_context("certificate")
        if not arn:
            text = "the load balancer has no TLS, so pictures and API keys can be read on their way"
            Annotations.of(self).add_warning(f"{text}; add -c certificate=ARN")
        service = patterns.ApplicationLoadBalancedFargateService(
            self,
            "Server",
            # Tasks in public subnets need no NAT gateway; only the load balancer can reach them.
            vpc=ec2.Vpc(self, "Network", max_azs=2, nat_gateways=0),
            assign_public_ip=True,
            certificate=(
                certificates.Certificate.from_certificate_arn(self, "Certificate", arn)
                if arn
                else None
            ),
            redirect_http=bool(arn),
            task_definition=self._define_task(),
            desired_count=2,
            min_healthy_percent=100,
            max_healthy_percent=200,
            circuit_breaker=ecs.DeploymentCircuitBreaker(rollback=True),
            health_check_grace_period=Duration.seconds(60),
        )
        targets = service.target_group
        targets.configure_health_check(
            path="/ready",
            interval=Duration.seconds(10),
            timeout=Duration.seconds(5),
            healthy_threshold_count=2,
            unhealthy_threshold_count=3,
        )
        targets.set_attribute("deregistration_delay.timeout_seconds", "10")
        tasks = service.service.auto_scale_task_count(min_capacity=2, max_capacity=10)
        tasks.scale_on_cpu_utilization("Load", target_utilization_percent=60)
        failed = balancing.HttpCodeTarget.TARGET_5XX_COUNT
        five_minutes = {"period": Duration.minutes(5)}
        p99 = targets.metrics.target_response_time(statistic="p99", **five_minutes)
        _alarm(
            self,
            {
                "Unhealthy": (targets.metrics.unhealthy_host_count(**five_minutes), 1),
                "Failed": (targets.metrics.http_code_target(failed, **five_minutes), 5),
                "Slow": (p99, 1.0),  # seconds, DEADLINE_MS
            },
        )

    def _define_task(self) -> ecs.FargateTaskDefinition:
        task = ecs.FargateTaskDefinition(self, "Task", cpu=1024, memory_limit_mib=2048)
        keys = {}
        if name := self.node.try_get_context("api-keys"):
            secret = secrets.Secret.from_secret_name_v2(self, "Keys", name)
            keys["API_KEYS"] = ecs.Secret.from_secrets_manager(secret)
        task.add_container(
            "server",
            image=ecs.ContainerImage.from_asset(str(ROOT), **_image(self, "serve")),
            port_mappings=[ecs.PortMapping(container_port=8000)],
            readonly_root_filesystem=True,
            stop_timeout=Duration.seconds(30),
            secrets=keys,
            logging=ecs.LogDrivers.aws_logs(stream_prefix="server", log_group=_make_logs(self)),
        )
        return task


def _image(stack: Stack, target: str) -> dict[str, Any]:
    """The image that the tests of deploy/ build, of this stage and with these models."""
    models = stack.node.try_get_context("models") or SAMPLE
    if not (ROOT / models / "model_info.json").exists():
        raise SystemExit(f"models={models}: no model_info.json there; `python run.py` makes one")
    return {
        "file": "deploy/Dockerfile",
        "target": target,
        "build_args": {"MODELS": models},
        "platform": assets.Platform.LINUX_AMD64,
    }


def _read_provisioned(stack: Stack) -> int | None:
    text = stack.node.try_get_context("provisioned")
    if text is not None and not (str(text).isdecimal() and int(text)):
        raise SystemExit(f"provisioned={text}: it must be a whole number of at least 1")
    return None if text is None else int(text)


def _make_logs(stack: Stack) -> logs.LogGroup:
    return logs.LogGroup(
        stack,
        "Log",
        retention=logs.RetentionDays.ONE_MONTH,
        removal_policy=RemovalPolicy.DESTROY,
    )


def _alarm(stack: Stack, limits: dict[str, tuple[cloudwatch.Metric, float]]) -> None:
    """An alarm for each metric that reaches its limit, sent to the topic in the outputs."""
    topic = sns.Topic(stack, "Alarms")
    for name, (metric, limit) in limits.items():
        alarm = cloudwatch.Alarm(
            stack,
            name,
            metric=metric,
            threshold=limit,
            comparison_operator=cloudwatch.ComparisonOperator.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            evaluation_periods=1,
            treat_missing_data=cloudwatch.TreatMissingData.NOT_BREACHING,
        )
        alarm.add_alarm_action(actions.SnsAction(topic))
    CfnOutput(stack, "AlarmTopic", value=topic.topic_arn)


def make_app(**arguments: Any) -> App:
    """Both stacks; `arguments` are those of App, such as `outdir` and `context`."""
    app = App(**arguments)
    FunctionStack(app, "DigitsFunction")
    ServiceStack(app, "DigitsService")
    return app


if __name__ == "__main__":
    make_app().synth()
