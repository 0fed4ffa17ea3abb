import pytest

from engine.run_errors import NodeError
from tests.node_calls import OpenThrottle, call

pytestmark = pytest.mark.anyio


async def test_a_throttle_with_a_key_shares_its_rate_and_one_without_belongs_to_its_node() -> None:
    road = OpenThrottle()
    rate = {"limit": 2, "perSeconds": 10}
    await call("throttle", {**rate, "key": "crm-{{ data.customer }}"}, {"customer": 7}, throttle=road)
    await call("throttle", {**rate, "key": "node:wf_1:node", "maxWaitSeconds": 5}, {}, throttle=road)
    await call("throttle", rate, {}, throttle=road)
    assert road.asked == [
        ("key:crm-7", 2, 10, 3600),
        ("key:node:wf_1:node", 2, 10, 5),
        ("node:wf_1:node", 2, 10, 3600),
    ]


@pytest.mark.parametrize("config", [{"limit": "{{ data.n }}"}, {"key": "{{ data.text }}"}])
async def test_a_throttle_refuses_invalid_values_of_templates(config: dict[str, str]) -> None:
    with pytest.raises(NodeError) as refused:
        await call("throttle", {"limit": 1, "perSeconds": 1, **config}, {"n": 0, "text": "x" * 201})
    assert refused.value.code == "invalid-config"
