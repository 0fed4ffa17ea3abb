"""Settings that a deployer refuses, and settings that it passes on to pods."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from models.settings import InvalidSettings
from runner.settings import RunnerSettings
from tests.cluster.cluster_harness import desired_deployment
from workers.cluster import manifests
from workers.cluster.manifests import ClusterLayout
from workers.deployer.settings import DeployerSettings

PRODUCTION: dict[str, Any] = {
    "secret_key": SecretStr("a secret of more than thirty-two characters"),
    "redis_url": "redis://r",
}
LOCAL: dict[str, Any] = {**PRODUCTION, "cluster": "local", "runner_gateway_url": "http://127.0.0.1:8000"}


def test_local_pods_need_the_consent_of_the_operator() -> None:
    with pytest.raises(InvalidSettings, match="PILOTFLAME_ALLOW_LOCAL_PODS"):
        DeployerSettings(**LOCAL).check_for_production()
    with pytest.raises(InvalidSettings, match="PILOTFLAME_RUNNER_GATEWAY_URL"):
        DeployerSettings(
            **{**LOCAL, "allow_local_pods": True, "runner_gateway_url": ""}
        ).check_for_production()
    DeployerSettings(**LOCAL, allow_local_pods=True).check_for_production()
    DeployerSettings(**PRODUCTION).check_for_production()


def egress_rules(text: str) -> list[Any]:
    """Return the egress rules of a workflow's network policy, except those for the gateway and the networks."""
    layout = ClusterLayout(
        "user-workflows",
        "gateway",
        "pilotflame",
        dns_endpoints=DeployerSettings(kubernetes_dns=text).dns_endpoints,
    )
    _, *names, _ = manifests.build_network_policy(desired_deployment(), layout)["spec"]["egress"]
    return [(rule["to"], [(port["protocol"], port["port"]) for port in rule["ports"]]) for rule in names]


def namespace_rule(name: str) -> list[Any]:
    return [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}]


def test_pods_look_up_names_where_the_cluster_answers_them() -> None:
    usual = [("UDP", 53), ("TCP", 53)]
    assert egress_rules("kube-system") == [(namespace_rule("kube-system"), usual)]
    assert egress_rules("openshift-dns:5353,169.254.20.10, [fd00::10]:53") == [
        (namespace_rule("openshift-dns"), [("UDP", 5353), ("TCP", 5353)]),
        ([{"ipBlock": {"cidr": "169.254.20.10/32"}}], usual),
        ([{"ipBlock": {"cidr": "fd00::10/128"}}], usual),
    ]
    for wrong in (
        "kube_system",
        "kube-system:0",
        "kube-system:65536",
        "10.0.0.300",
        "53",
        "a:b:c",
        "10.0.0.1/8",
    ):
        with pytest.raises(ValidationError, match=r"DNS|network"):
            DeployerSettings(kubernetes_dns=wrong)


def test_pods_get_the_settings_of_runs_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DeployerSettings(
        **LOCAL,
        lease_seconds=2,
        code_nodes="pods-only",
        outbound_allowed_networks=(ip_network("10.1.0.0/16"), ip_network("127.0.0.1/32")),
        log_level="warning",
    )
    given = settings.pod_environment("wf_1")
    assert not {"PILOTFLAME_SECRET_KEY", "PILOTFLAME_REDIS_URL", "PILOTFLAME_DATABASE_URL"} & given.keys()
    assert "PILOTFLAME_COMMIT_SECONDS" not in given
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    read = RunnerSettings(runner_token=SecretStr("token"))  # type: ignore[call-arg]  # the rest stands in the environment
    assert (read.runner_workflow_id, read.runner_gateway_url) == ("wf_1", "http://127.0.0.1:8000")
    assert (read.lease_seconds, read.code_nodes, read.log_level) == (2, "pods-only", "warning")
    assert read.outbound_allowed_networks == settings.outbound_allowed_networks
    assert read.runner_drain_seconds == settings.runner_drain_seconds
