from __future__ import annotations

from engine.graph import GraphEdge, GraphNode, ParsedGraph, RetryPolicy, RunSettings


def test_a_stored_definition_is_read_as_it_says() -> None:
    graph = ParsedGraph.from_stored(
        {
            "nodes": [
                {
                    "id": "pay",
                    "type": "http-request",
                    "version": "1.0.0",
                    "label": "Pay",
                    "config": {"url": "https://example.com"},
                    "inputMappings": {"amount": "data.total"},
                    "passThroughValues": {"total": "amount"},
                    "retry": {"maxAttempts": 5, "backoff": 2, "maxDelay": 60, "jitter": 0},
                    "timeout": 30,
                }
            ],
            "connections": [
                {"id": "e", "source": "a", "sourcePort": "true", "target": "pay", "targetPort": "tools"}
            ],
            "settings": {"timeout": 60, "strictMappings": True, "parallelism": 4, "maxRetries": 3},
        }
    )
    (node,) = graph.nodes
    assert node == GraphNode(
        id="pay",
        type="http-request",
        version="1.0.0",
        label="Pay",
        config={"url": "https://example.com"},
        input_mappings={"amount": "data.total"},
        pass_through_values={"total": "amount"},
        retry=RetryPolicy(max_attempts=5, backoff_seconds=2.0, max_delay_seconds=60.0, jitter=0.0),
        timeout_seconds=30.0,
        has_own_retry=True,
    )
    assert graph.edges == (GraphEdge("e", "a", "pay", source_port="true", target_port="tools"),)
    assert graph.settings == RunSettings(timeout_seconds=60.0, strict_mappings=True, parallelism=4)


def test_omitted_fields_have_defaults() -> None:
    graph = ParsedGraph.from_stored(
        {"nodes": [{"id": "a", "type": "log", "config": None, "retry": None}], "connections": None}
    )
    assert graph.nodes == (GraphNode("a", "log", label="a"),)
    assert graph.settings == RunSettings(timeout_seconds=3600.0, strict_mappings=False, parallelism=16)
    assert graph.nodes[0].retry.max_attempts == 1
    assert GraphEdge.from_stored({"id": "e", "source": "a", "target": "b"}) == GraphEdge(
        "e", "a", "b", source_port="output", target_port="input"
    )


def test_edges_that_lead_nowhere_are_kept_but_not_followed() -> None:
    whole, broken = GraphEdge("whole", "a", "b"), GraphEdge("broken", "a", "gone")
    graph = ParsedGraph(
        [GraphNode("a", "manual"), GraphNode("b", "log")], [whole, broken, GraphEdge("odd", "gone", "b")]
    )
    assert len(graph.edges) == 3
    assert graph.outbound == {"a": [whole], "b": []}
    assert graph.inbound == {"a": [], "b": [whole]}


def test_pauses_between_attempts_double_up_to_the_longest() -> None:
    retry = RetryPolicy(max_attempts=9, backoff_seconds=2.0, max_delay_seconds=30.0, jitter=0.0)
    assert [retry.delay_seconds(attempt, chance=1.0) for attempt in range(1, 8)] == [2, 4, 8, 16, 30, 30, 30]
    assert retry.delay_seconds(100_000, chance=1.0) == 30


def test_chance_shortens_a_pause_by_the_jitter_at_most() -> None:
    retry = RetryPolicy(backoff_seconds=10.0, jitter=0.5)
    assert [retry.delay_seconds(1, chance) for chance in (0.0, 0.5, 1.0)] == [10.0, 7.5, 5.0]
