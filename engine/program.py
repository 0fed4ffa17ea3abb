"""Compiled workflow: each config and each data-independent hash is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Final, Self

from msgspec import Struct, field
from msgspec.structs import replace

from engine import content_recording, task_node
from engine.agents import agent_wiring
from engine.agents.agent_steps import AGENT_TYPE
from engine.agents.tool_kinds import SUB_WORKFLOW_TYPE
from engine.conditions import CompiledCondition, compile_condition
from engine.expressions import (
    Expression,
    ExpressionError,
    ValueTemplate,
    compile_expression,
    compile_template,
    compile_value,
    list_paths,
    literal_template,
)
from engine.graph import GraphSection, RetryPolicy, divide_graph
from engine.joins import JoinConfig, JoinMode
from engine.node_api import (
    CONTINUE,
    MCP_TOOL_TYPE,
    OF_EACH,
    OUTPUT,
    TOOL_TYPE,
    FieldCompilation,
    NodeEffect,
    NodeResult,
    NodeType,
    RunNode,
)
from engine.node_key import NO_READS, digest_part, digest_ports
from engine.node_lookup import NodeTypeLookup
from engine.pruning import prune_graph
from engine.run_errors import InvalidDefinition
from engine.values import encode_canonical

if TYPE_CHECKING:
    from engine.expressions import ExpressionPath
    from engine.graph import GraphNode, ParsedGraph
    from engine.values import Json

EVERY_NODE: Final = ""
TOOL_RETRY_SECONDS: Final = 1.0
TOOL_ATTEMPTS: Final = 2
TOOL_TIMEOUT_SECONDS: Final = 60.0
TOOL_RESULT_BYTES: Final = 16_000
"""Limits of nodes that are tools without a `tool`, which has the same by default."""
STRICT: Final = "settings.strictMappings"
OUTER_ROOTS: Final = ("trigger", "nodes", "execution", "approval")
"""Roots whose values are the same for all iterations of a loop."""


class NodeProgram(Struct, frozen=True):
    """Compiled node."""

    node: GraphNode
    node_type: NodeType
    effect: NodeEffect
    is_write: bool
    """Whether the node changes something outside."""
    commits_alone: bool
    """Whether the journal commits before and after a call: of writes, and of calls that cost money."""
    config: ValueTemplate
    conditions: Mapping[str, CompiledCondition]
    values: Mapping[str, ValueTemplate]
    mappings: Mapping[str, ValueTemplate | Expression]
    pass_through: Mapping[str, str]
    missing: str | None
    """Message about missing config; the node fails with it when it is reached."""
    static_hashes: bytes
    """Digests of type and version, of the config with defaults, and of the mappings."""
    outside: tuple[ExpressionPath, ...] = ()
    """Paths outside `data` that late values and conditions can read, and for a loop the nodes of its body."""
    late_nodes: tuple[str, ...] = ()
    """Nodes that late values and conditions can read; `EVERY_NODE` for a path to all outputs."""
    implementation: bytes = b""
    """Digest of its implementation, and for a loop of its body."""
    key_end: bytes = b""
    """Digests of implementation and ports, and of its reads if nothing can be read."""
    body: frozenset[str] = frozenset()
    """Nodes inside a loop, at all depths."""
    is_volatile: bool = False
    """Whether its result depends on clock or chance, so that a replay treats it as a read."""
    join: JoinConfig | None = None
    is_given_again: bool = False
    """Whether its first input is recorded and reused whenever the node is resumed."""
    defaults: Mapping[str, Json] = field(default_factory=dict)
    """Fields of the config that the definition lacks, for a recorded config of an older release."""
    is_pinned: bool = False
    agent: AgentProgram | None = None
    """Model and tools of an agent."""
    has_tainted_input: bool = False
    """Whether a node before it may give it text of outsiders; of nodes that start a sub-workflow run alone."""
    records_content: bool = True
    """Whether the journal keeps its prompts and answers; for an agent, also those of the agents inside it."""


class ToolProgram(Struct, frozen=True):
    """Compiled tool of an agent."""

    name: str
    description: str
    parameters: Mapping[str, Json]
    """JSON Schema of the arguments."""
    program: NodeProgram
    """Node that does the call; its config reads the arguments as `args`."""
    run: RunNode
    max_result_bytes: int
    is_repeated: bool
    """Whether a write with an unknown outcome is repeated under its key."""
    approval: str | None = None
    """Calls that a person has to approve, in place of the agent's rule."""
    is_untrusted: bool = False
    """Whether its results may hold text of outsiders."""
    fills_config: bool = False
    """Whether the arguments are fields of the node's config, beside the fixed ones."""
    asks_about_unknown: bool = False
    """Whether a person decides about a write with an unknown outcome."""

    @property
    def effect(self) -> NodeEffect:
        return self.program.effect

    @property
    def fingerprint(self) -> str:
        """Digest of everything that is fixed in it, for an agent with that of its tools."""
        hashes = self.program.static_hashes
        return (hashes if self.program.agent is None else hashes + self.program.implementation).hex()

    @property
    def is_awaited(self) -> bool:
        """Whether another process gives its result, for which the agent waits without a worker."""
        node_type = self.program.node_type
        return node_type.task is not None or node_type.type == SUB_WORKFLOW_TYPE

    @property
    def is_paid(self) -> bool:
        """Whether its calls ask language models themselves; an agent does so in steps of its own."""
        return self.program.node_type.is_paid and self.program.agent is None


class AgentProgram(Struct, frozen=True):
    """Providers of one agent."""

    tools: Mapping[str, ToolProgram] = field(default_factory=dict)
    """Tools by name."""
    model_config: ValueTemplate | None = None
    """Config of the node at the port `ai`; None without one."""
    has_tainted_input: bool = False
    """Whether a node before the agent may give it text of outsiders."""

    @property
    def paths(self) -> tuple[ExpressionPath, ...]:
        """Paths by which the agent's model and tools read values of the run, without those into `data` and `args`."""
        found = [path for tool in self.tools.values() for path in tool.program.config.paths]
        found += [path for tool in self.tools.values() for path in tool.program.outside]
        found += self.model_config.paths if self.model_config is not None else ()
        return tuple({path.text: path for path in found if path.root not in {"data", "args"}}.values())


class WorkflowProgram(Struct, frozen=True):
    """Compiled graph, shared by all runs of the same definition."""

    graph: ParsedGraph
    """Part of the definition that is run."""
    root: GraphSection
    """Section outside of all loops; it contains the sections of their bodies."""
    nodes: Mapping[str, NodeProgram]
    runs: Mapping[str, RunNode]
    """Implementation of each node."""
    inline: frozenset[str]
    """Nodes whose implementation returns at once, so that they need no task."""
    repeatable: frozenset[str]
    """Other nodes without effects; a call that takes too long may be repeated in a thread."""
    has_agents: bool = False
    """Whether a run of it may have steps of agents."""

    @classmethod
    def compile(
        cls, graph: ParsedGraph, catalog: NodeTypeLookup, implementation: Callable[[str], RunNode]
    ) -> Self:
        """Compile a graph, reduced to the nodes that run; `implementation` returns the function of a node type.

        Raises `InvalidDefinition` for a graph that can't be compiled, such as one with an unknown type or an invalid
        expression; other errors of validation are not detected.
        """
        try:
            drawn = prune_graph(graph, catalog)
            graph = agent_wiring.remove_providers(drawn)
            nodes = {node.id: _compile_pinned_or_node(node, graph, catalog) for node in graph.nodes}
            for node in agent_wiring.list_agents(graph.nodes):
                if node.id not in graph.pinned:
                    agent = _compile_agent(node, drawn, catalog, implementation)
                    is_recorded = agent_wiring.find_unrecorded(node, drawn) is None
                    nodes[node.id] = replace(
                        _complete_agent(nodes[node.id], agent), records_content=is_recorded
                    )
            nodes |= _mark_tainted_starts(nodes, drawn)
            run = {
                node.type
                for node in graph.nodes
                if node.id not in graph.pinned and nodes[node.id].node_type.task is None
            }
            kinds = {kind: implementation(kind) for kind in run}
            tasks = {
                node_id: task_node.build_runner(each.node, each.node_type, catalog)
                for node_id, each in nodes.items()
                if each.node_type.task is not None
            }
        except (LookupError, ExpressionError) as error:
            raise InvalidDefinition(str(error)) from error
        pinned = {
            node_id: _build_pinned_runner(nodes[node_id], graph)
            for node_id in graph.pinned
            if node_id in nodes
        }
        own = {**tasks, **pinned}
        runs = {node_id: own.get(node_id) or kinds[each.node.type] for node_id, each in nodes.items()}
        root = divide_graph(
            graph,
            loops=[key for key, each in nodes.items() if each.node_type.loops and not each.is_pinned],
            first=[key for key, each in nodes.items() if each.node_type.is_trigger or each.is_pinned],
            eager=[key for key, each in nodes.items() if each.join and each.join.mode is JoinMode.ANY],
        )
        return cls(
            graph=graph,
            root=root,
            nodes={**nodes, **_complete_keys(nodes, root, graph)},
            runs=runs,
            has_agents=any(program.agent is not None for program in nodes.values()),
            inline=frozenset(node_id for node_id, run in runs.items() if not iscoroutinefunction(run)),
            repeatable=frozenset(
                node_id
                for node_id, run in runs.items()
                if iscoroutinefunction(run) and nodes[node_id].node_type.effect.of({}) is NodeEffect.PURE
            ),
        )


def _compile_pinned_or_node(node: GraphNode, graph: ParsedGraph, catalog: NodeTypeLookup) -> NodeProgram:
    """Compile a node; a pinned one, which returns a given output, gets an empty config, so that it can't fail.

    Raises `LookupError` and `ExpressionError`.
    """
    if node.id not in graph.pinned:
        return compile_node(node, catalog)
    bare = replace(node, config={}, input_mappings={}, pass_through_values={})
    return replace(
        compile_node(bare, catalog),
        effect=NodeEffect.PURE,
        is_write=False,
        commits_alone=False,
        config=compile_template({}),
        conditions={},
        values={},
        missing=None,
        join=None,
        is_given_again=False,
        implementation=digest_part({"pinned": graph.pinned[node.id]}),
        is_pinned=True,
    )


def _mark_tainted_starts(nodes: Mapping[str, NodeProgram], drawn: ParsedGraph) -> dict[str, NodeProgram]:
    """Return marked copies of the sub-workflow nodes whose input may hold text of outsiders, by id; others are left
    out.

    `drawn` is the graph with the models and tools of agents, whose texts count too.
    """
    starts = [program for program in nodes.values() if program.node.type == SUB_WORKFLOW_TYPE]
    if not starts:
        return {}
    from engine.agents import agent_exposure  # noqa: PLC0415 - loaded by workflows with sub-workflows or agents

    return {
        program.node.id: replace(program, has_tainted_input=True)
        for program in starts
        if agent_exposure.has_tainted_input(program.node, drawn)
    }


def _build_pinned_runner(program: NodeProgram, graph: ParsedGraph) -> RunNode:
    """Return the function of a pinned node, which returns its pinned output.

    It leaves by the port `output`, or by the first connected one if the type has no such port.
    """
    node_id = program.node.id
    ports = program.node_type.outputs_of(graph.by_id[node_id].config)
    connected = {edge.source_port for edge in graph.outbound[node_id]} - {CONTINUE}
    port = OUTPUT if OUTPUT in ports else next((port for port in ports if port in connected), OUTPUT)
    result = NodeResult(graph.pinned[node_id], port)
    return lambda _call: result


def _complete_keys(
    nodes: Mapping[str, NodeProgram],
    section: GraphSection,
    graph: ParsedGraph,
) -> dict[str, NodeProgram]:
    """Return the programs of a section's nodes and of the bodies in it, by id, with the parts of their keys that depend
    on the graph.
    """
    done: dict[str, NodeProgram] = {}
    for body in section.bodies.values():
        done |= _complete_keys(nodes, body, graph)
    for node in section.graph.nodes:
        if node.id == section.loop_id:
            continue
        program = nodes[node.id]
        implementation = program.implementation
        outside = program.outside
        body_ids: frozenset[str] = frozenset()
        if node.id in section.bodies:
            body = section.bodies[node.id]
            body_ids = frozenset(inner.id for inner in body.inner_nodes())
            implementation = _implementation_with_body(implementation, body, done)
            outside = _outside_of_body(program, [done[inner] for inner in sorted(body_ids)], body_ids)
        ports = [(edge.source_port, edge.target_port) for edge in graph.inbound[node.id]]
        if graph.settings.strict_mappings:
            ports.append(("", STRICT))
        done[node.id] = replace(
            program,
            outside=outside,
            implementation=implementation,
            key_end=implementation + digest_ports(ports) + (b"" if outside else NO_READS),
            body=body_ids,
        )
    return done


def _implementation_with_body(own: bytes, body: GraphSection, nodes: Mapping[str, NodeProgram]) -> bytes:
    """Return the digest of a loop's implementation and its body: nodes, connections, and nested bodies."""
    inner: list[Json] = [
        [node.id, nodes[node.id].static_hashes.hex(), nodes[node.id].implementation.hex()]
        for node in body.graph.nodes
        if node.id != body.loop_id
    ]
    edges: list[Json] = [
        [edge.source, edge.source_port, edge.target, edge.target_port] for edge in body.graph.edges
    ]
    return digest_part([own.hex(), inner, edges])


def _outside_of_body(
    loop: NodeProgram, inner: Sequence[NodeProgram], body_ids: frozenset[str]
) -> tuple[ExpressionPath, ...]:
    """Return the paths with which a loop and its body read values outside of both, each once."""
    paths = {path.text: path for path in loop.outside}
    hidden = body_ids | {loop.node.id}
    for program in inner:
        for path in (*program.outside, *program.config.paths, *mapping_paths(program)):
            is_inside = path.root == "nodes" and bool(path.steps) and path.steps[0][0] in hidden
            if path.root in OUTER_ROOTS and not is_inside:
                paths[path.text] = path
    return tuple(paths.values())


def mapping_paths(program: NodeProgram) -> Iterator[ExpressionPath]:
    """Yield the paths of the input mappings of a node."""
    for source in program.mappings.values():
        yield from source.paths if isinstance(source, ValueTemplate) else list_paths(source)


def compile_node(node: GraphNode, catalog: NodeTypeLookup) -> NodeProgram:
    """Compile one node: its config, mappings, conditions and the static part of its key.

    Defaults of the type complete the config. A missing required field is no error: `missing` has the message about the
    first, with which the node fails when it is reached. Raises `LookupError` for an unknown type or version, and
    `ExpressionError` for a bad expression.
    """
    node_type = catalog.get(node.type, node.version)
    config = catalog.with_defaults(node_type, node.config)
    early, late = _divide_config(config, node_type.compiled)
    problems = catalog.config_problems(node_type, node.config)
    effect = node_type.effect.of(config)
    mappings = {key: compile_mapping(value) for key, value in node.input_mappings.items()}
    conditions = {
        place: compile_condition(value)
        for place, (kind, value) in late.items()
        if kind is FieldCompilation.CONDITION
    }
    values = {
        place: literal_template(value) if kind is FieldCompilation.LITERAL else compile_value(value)
        for place, (kind, value) in late.items()
        if kind is not FieldCompilation.CONDITION
    }
    literals = [value for kind, value in late.values() if kind is FieldCompilation.LITERAL]
    late_paths = [path for condition in conditions.values() for path in condition.paths]
    late_paths += [path for template in values.values() for path in template.paths]
    late_paths += [path for value in literals for path in _literal_paths(value)]
    parts: tuple[Json, ...] = (
        [node_type.type, node_type.version],
        config,
        {"mappings": dict(node.input_mappings), "passThrough": dict(node.pass_through_values)},
    )
    return NodeProgram(
        node=node,
        node_type=node_type,
        effect=effect,
        is_write=effect is NodeEffect.WRITE,
        commits_alone=effect is NodeEffect.WRITE or node_type.is_paid,
        config=compile_template(early),
        conditions=conditions,
        values=values,
        mappings=mappings,
        missing=next((p.message for p in problems if p.keyword == "required"), None),
        pass_through={key: str(value) for key, value in node.pass_through_values.items()},
        static_hashes=b"".join(sha256(encode_canonical(part)).digest() for part in parts),
        late_nodes=_list_named_nodes(late_paths),
        implementation=catalog.implementation_digest(node_type),
        outside=tuple({path.text: path for path in late_paths if path.root != "data"}.values()),
        join=JoinConfig.from_config(config) if node_type.joins else None,
        is_volatile=any(rule.applies_to(config) for rule in node_type.volatile),
        is_given_again=effect is NodeEffect.WRITE or node_type.is_paid or node_type.loops,
        defaults={name: value for name, value in early.items() if name not in node.config},
        records_content=content_recording.is_recorded(node.type, node.config),
    )


def _list_named_nodes(paths: Sequence[ExpressionPath]) -> tuple[str, ...]:
    """Return the ids of nodes that paths name, each once; `EVERY_NODE` for `nodes` as a whole."""
    named = (path.steps[0][0] if path.steps else None for path in paths if path.root == "nodes")
    return tuple(dict.fromkeys(EVERY_NODE if name is None else name for name in named))


def _literal_paths(value: Json) -> Sequence[ExpressionPath]:
    """Return the paths that the expressions in a value read, for a field that its node compiles itself; none if the
    value is no expression, such as a script.
    """
    try:
        return compile_value(value).paths
    except ExpressionError:
        return ()  # it is no expression, such as a script


def _divide_config(
    config: Mapping[str, Json], compiled: Mapping[str, FieldCompilation]
) -> tuple[dict[str, Json], dict[str, tuple[FieldCompilation, Json]]]:
    """Split a config into the fields to render before a call, and those that the node evaluates itself, by
    place with their kind.

    Fields of list items have places such as `items.0.value`, and are removed from the items.
    """
    early = dict(config)
    late: dict[str, tuple[FieldCompilation, Json]] = {}
    for place, kind in compiled.items():
        field, of_each, name = place.partition(OF_EACH)
        if field not in early:
            continue
        value = early[field]
        if not of_each:
            late[field] = kind, early.pop(field)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict) and name in item:
                    late[f"{field}.{index}.{name}"] = kind, item[name]
            early[field] = [_without_fields(item, name) for item in value]
    return early, late


def _without_fields(item: Json, name: str) -> Json:
    return {key: value for key, value in item.items() if key != name} if isinstance(item, dict) else item


def _compile_agent(
    agent: GraphNode,
    graph: ParsedGraph,
    catalog: NodeTypeLookup,
    implementation: Callable[[str], RunNode],
    depth: int = 1,
) -> AgentProgram:
    """Compile the providers that are wired to an agent in `graph`; `depth` counts it and the agents above it.

    Raises `LookupError` for an unknown type, and for agents that nest too deeply or have too many tools; raises
    `ExpressionError`.
    """
    from engine.agents import agent_exposure  # noqa: PLC0415 - loaded by workflows with agents

    if depth == 1 and agent_wiring.has_too_many_tools(agent, graph):
        raise LookupError(f"The agents inside {agent.label} have too many tools")
    tools: dict[str, ToolProgram] = {}
    model_config: ValueTemplate | None = None
    for edge in graph.inbound[agent.id]:
        provider = graph.by_id[edge.source]
        if edge.target_port == agent_wiring.PORT_OF_MODELS:
            config = catalog.with_defaults(catalog.get(provider.type, provider.version), provider.config)
            model_config = compile_template(config)
        elif edge.target_port == agent_wiring.PORT_OF_TOOLS:
            tool = _compile_tool(provider, agent, catalog, implementation)
            is_untrusted = agent_exposure.gives_outside_text(tool.program.node.type)
            if tool.program.node.type == AGENT_TYPE:
                if depth >= agent_wiring.MAX_AGENT_DEPTH:
                    raise LookupError(
                        f"Agents nest at most {agent_wiring.MAX_AGENT_DEPTH} deep: {tool.program.node.label}"
                    )
                nested = _compile_agent(tool.program.node, graph, catalog, implementation, depth + 1)
                is_untrusted = any(each.is_untrusted for each in nested.tools.values())
                tool = replace(tool, program=_complete_agent(tool.program, nested))
            tools[tool.name] = replace(tool, is_untrusted=is_untrusted)
    return AgentProgram(tools, model_config, agent_exposure.has_tainted_input(agent, graph))


def _complete_agent(program: NodeProgram, agent: AgentProgram) -> NodeProgram:
    """Return the program of an agent with its model and tools, so that its key also covers these and the paths that
    they read.

    Its effect is `write` if a tool has that effect, else `read`.
    """
    is_write = any(tool.effect is NodeEffect.WRITE for tool in agent.tools.values())
    # The model reads names, descriptions, parameters and results, so that its answers depend on them.
    parts: list[Json] = [
        [
            *(tool.name, tool.description, dict(tool.parameters), tool.max_result_bytes),
            *(tool.program.static_hashes.hex(), tool.program.implementation.hex()),
        ]
        for tool in agent.tools.values()
    ]
    model = None if agent.model_config is None else agent.model_config.source
    paths = {path.text: path for path in (*program.outside, *agent.paths)}
    names = [path.steps[0][0] if path.steps else None for path in paths.values() if path.root == "nodes"]
    return replace(
        program,
        agent=agent,
        effect=NodeEffect.WRITE if is_write else NodeEffect.READ,
        is_write=is_write,
        implementation=digest_part([program.implementation.hex(), parts, model]),
        outside=tuple(paths.values()),
        late_nodes=tuple(dict.fromkeys([*program.late_nodes, *(name or "" for name in names)])),
    )


def _compile_tool(
    tool: GraphNode,
    agent: GraphNode,
    catalog: NodeTypeLookup,
    implementation: Callable[[str], RunNode],
) -> ToolProgram:
    """Compile a node at the port `tools` of an agent, with the node that does its calls.

    Raises `LookupError` without a target and for an unknown type, and `ExpressionError`.
    """
    if tool.type != TOOL_TYPE:
        return _compile_direct_tool(tool, agent, catalog, implementation)
    config = catalog.with_defaults(catalog.get(tool.type, tool.version), tool.config)
    target = agent_wiring.target_of(tool)
    if target is None:
        raise LookupError(f"The tool {tool.id!r} has no target")
    target_type = catalog.get(target.type, target.version)
    is_repeated = _is_repeated(config, target) and not agent.at_most_once
    is_task = target_type.task is not None
    target = replace(
        target,
        # The rules of a custom type hold for its tasks unless the tool itself has others.
        timeout_seconds=_number(tool.config if is_task else config, "timeout", 0.0) or None,
        retry=RetryPolicy(int(_number(config, "maxAttempts", 1)), TOOL_RETRY_SECONDS),
        has_own_retry="maxAttempts" in tool.config,
        at_most_once=not is_repeated,
    )
    run = task_node.build_runner(target, target_type, catalog) if is_task else implementation(target.type)
    parameters = config.get("parameters")
    return ToolProgram(
        name=str(config.get("name", tool.id)),
        description=str(config.get("description", "")),
        parameters=parameters if isinstance(parameters, dict) else {},
        program=compile_node(target, catalog),
        run=run,
        max_result_bytes=int(_number(config, "maxResultBytes", TOOL_RESULT_BYTES)),
        is_repeated=is_repeated,
        approval=_optional_text(config, "approval"),
        asks_about_unknown=config.get("onUnknown") == "ask",
    )


def _compile_direct_tool(
    node: GraphNode,
    agent: GraphNode,
    catalog: NodeTypeLookup,
    implementation: Callable[[str], RunNode],
) -> ToolProgram:
    """Compile a node that is connected to an agent without a `tool`; it keeps its own timeout and retries.

    Raises `LookupError` for an unknown type, and `ExpressionError`.
    """
    from engine.agents import direct_tools  # noqa: PLC0415 - loaded by workflows with such agents

    node_type = catalog.get(node.type, node.version)
    is_task = node_type.task is not None
    is_repeated = node.type != MCP_TOOL_TYPE and not node.at_most_once and not agent.at_most_once
    target = replace(
        node,
        timeout_seconds=node.timeout_seconds or (None if is_task else TOOL_TIMEOUT_SECONDS),
        retry=node.retry if node.has_own_retry else RetryPolicy(TOOL_ATTEMPTS, TOOL_RETRY_SECONDS),
        at_most_once=not is_repeated,
    )
    unfilled = direct_tools.list_unfilled(node, node_type)
    missing = f"{' and '.join(unfilled)}: a model can't fill it in" if unfilled else None
    return ToolProgram(
        name=direct_tools.name_tool(node),
        description=direct_tools.describe_tool(node, node_type),
        parameters=direct_tools.build_parameters(node, node_type),
        program=replace(compile_node(target, catalog), missing=missing),
        run=task_node.build_runner(target, node_type, catalog) if is_task else implementation(node.type),
        max_result_bytes=TOOL_RESULT_BYTES,
        is_repeated=is_repeated,
        fills_config=True,
    )


def _is_repeated(config: Mapping[str, Json], target: GraphNode) -> bool:
    """Return whether a tool repeats a write with an unknown outcome, by `onUnknown` of its config.

    Without that, all do except those of tool servers, which mostly ignore idempotency keys.
    """
    by_default = "fail" if target.type == MCP_TOOL_TYPE else "retry"
    return config.get("onUnknown", by_default) == "retry"


def _number(config: Mapping[str, Json], name: str, default: float) -> float:
    value = config.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _optional_text(config: Mapping[str, Json], name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) else None


def compile_mapping(source: Json) -> ValueTemplate | Expression:
    """Compile the source of one mapped field: a text without braces is an expression, others are templates or
    constants.

    Raises `ExpressionError`.
    """
    if isinstance(source, str) and "{{" not in source:
        return compile_expression(source)
    return compile_template(source)
