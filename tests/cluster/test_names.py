from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from models import ids
from models import pod_identity as names
from tests.cluster.cluster_harness import cluster_layout, desired_deployment
from tests.cluster.fake_api import object_rules
from tests.cluster.fake_api.schema import KINDS
from workers.cluster import manifests
from workers.cluster.driver import TOKEN_VARIABLE

RFC_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?\Z")
ANY_ID = st.text(alphabet="aAwWfF_-./ é0", max_size=80) | st.text(max_size=80)


@given(st.lists(ANY_ID, min_size=2, max_size=5, unique=True))
def test_names_are_valid_everywhere_and_never_meet(workflow_ids: list[str]) -> None:
    made = [name(one) for one in workflow_ids for name in (names.workflow_name, names.pods_service_name)]
    assert all(RFC_1035.match(name) and len(name) <= 63 for name in made)
    assert len(set(made)) == len(made)


def test_an_id_of_our_own_can_be_read_in_its_name() -> None:
    workflow_id = ids.new_id("wf")
    assert names.workflow_name(workflow_id) == "workflow-" + workflow_id.replace("_", "-")
    lookalikes = {workflow_id, workflow_id.replace("_", "-"), workflow_id.upper(), workflow_id + "-"}
    assert len({names.workflow_name(one) for one in lookalikes}) == 4


@given(st.text(max_size=40), st.text(alphabet="$()aA{}%", max_size=20))
def test_objects_are_valid_and_restricted_for_any_user_input(text: str, value: str) -> None:
    made = manifests.build_objects(
        desired_deployment(workflow_id=text, organization_id=text, environment={"A": value}), cluster_layout()
    )
    for manifest in made:
        kind = next(kind for kind in KINDS.values() if kind.name == manifest["kind"])
        assert object_rules.find_problems(kind, manifest) == []
    pod = made[-1]["spec"]["template"]["spec"]
    assert object_rules.restricted_violations(pod) == []


def test_the_token_stands_in_its_secret_alone_and_replicas_nowhere() -> None:
    made = manifests.build_objects(
        desired_deployment(environment={TOKEN_VARIABLE: "other-canary"}), cluster_layout()
    )
    assert [manifest["kind"] for manifest in made if "token-canary" in str(manifest)] == []
    assert "other-canary" not in str(made)
    deployment = made[-1]
    assert "replicas" not in deployment["spec"]
    assert deployment["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_service_of_a_workflow_leads_to_the_gateway_which_alone_may_enter() -> None:
    one = desired_deployment()
    service = manifests.build_gateway_service(one, cluster_layout())
    assert service["metadata"]["name"] == names.workflow_name(one.workflow_id)
    assert service["spec"] == {"type": "ExternalName", "externalName": cluster_layout().gateway_host}
    policy = manifests.build_network_policy(one, cluster_layout())["spec"]
    (ingress,) = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [set(peer) for peer in ingress["from"]] == [{"namespaceSelector", "podSelector"}]
