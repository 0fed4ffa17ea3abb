"""Builder of workflows: nodes of the catalog, connected by ports, with expressions that read outputs of other nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar, cast

from pilotflame_sdk.workflow_expressions import WorkflowExpression, render_expressions

if TYPE_CHECKING:
    from typing_extensions import Self
    from typing_extensions import TypeVar as TypeVarWithDefault

    Port = TypeVarWithDefault("Port", bound=str, default=str)
    Output_co = TypeVarWithDefault(
        "Output_co", bound=WorkflowExpression, default=WorkflowExpression, covariant=True
    )

    class _TypedNode(Generic[Port, Output_co]):
        pass
else:
    Port = TypeVar("Port", bound=str)
    Output_co = TypeVar("Output_co", bound=WorkflowExpression, covariant=True)

    class _TypedNode:
        """Base that accepts type arguments at run time, where type variables have no defaults before Python 3.13."""

        def __class_getitem__(cls, _arguments: object) -> type:
            return cls


OUTPUT: Final = "output"
INPUT: Final = "input"
ERROR: Final = "error"
"""Output port that every node has."""

Status = Literal["draft", "active", "paused", "archived"]


class NodeConfig(_TypedNode[Port, Output_co]):
    """Node type with its config; `Workflow.add` makes it a node.

    The functions that `pilotflame pull` writes return it. None leaves a field of the config out.
    """

    def __init__(
        self,
        type: str,  # noqa: A002 - the name of the API
        config: Mapping[str, Any] | None = None,
        *,
        version: str | None = None,
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        outputs_from: str = "",
    ) -> None:
        """`outputs_from` is the place of further output ports in the config, such as `cases[].port`."""
        self.type = type
        self.version = version
        self.config = {name: value for name, value in (config or {}).items() if value is not None}
        self.inputs = inputs
        """Names of the input ports; None if they are unknown until the server checks them."""
        self.outputs = None if outputs is None else (*self._list_ports(outputs_from), *outputs, ERROR)
        """Names of the output ports; None if they are unknown until the server checks them."""

    def _list_ports(self, place: str) -> list[str]:
        """Return the ports at a place of the config, as the server reads them: others than texts are none."""
        field, _, name = place.partition("[].")
        items = self.config.get(field)
        ports = (
            [item.get(name) for item in items if isinstance(item, Mapping)]
            if isinstance(items, (list, tuple))
            else []
        )
        return [port for port in ports if isinstance(port, str)]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.type}>"


class TriggerConfig(NodeConfig[Port, Output_co]):
    """Type of a trigger with its config; `Workflow.trigger` makes it a node."""


class NodePort:
    """Output port of a node of a workflow, from which other nodes continue."""

    def __init__(self, node: WorkflowNode[Any, Any], name: str) -> None:
        self.node = node
        self.name = name

    def __repr__(self) -> str:
        return f"<NodePort {self.name} of {self.node.id}>"


class WorkflowNode(_TypedNode[Port, Output_co]):
    """Node of a workflow."""

    def __init__(self, node_id: str, config: NodeConfig[Port, Output_co], fields: Mapping[str, Any]) -> None:
        self.id = node_id
        self.config = config
        self._fields = {name: value for name, value in fields.items() if value is not None}

    def __repr__(self) -> str:
        return f"<WorkflowNode {self.id} {self.config.type}>"

    @property
    def data(self) -> Output_co:
        """Output of the node: `node.data.body.file` becomes a path in the config of another node."""
        is_trigger = isinstance(self.config, TriggerConfig)
        found = WorkflowExpression("trigger") if is_trigger else WorkflowExpression("nodes")[self.id]
        # The class of the output only says which fields there are.
        return cast("Output_co", found)

    def port(self, name: Port | Literal["error"]) -> NodePort:
        """Return an output port; raises `ValueError` for a port that the node type does not have."""
        known = self.config.outputs
        if known is not None and name not in known:
            raise ValueError(f"{self.config.type} has no port {name!r}: it has {', '.join(known)}")
        return NodePort(self, name)

    def default_port(self) -> NodePort:
        """Return the port `output`, or the only port with another name; raises `ValueError` if it has to be chosen."""
        own = [] if self.config.outputs is None else [one for one in self.config.outputs if one != ERROR]
        if not own or OUTPUT in own:
            return NodePort(self, OUTPUT)
        if len(own) == 1:
            return NodePort(self, own[0])
        raise ValueError(
            f"Name a port of {self.id}, as in {self.id}.port({own[0]!r}): it has {', '.join(own)}"
        )

    def definition(self) -> dict[str, Any]:
        """Return the node as JSON."""
        found: dict[str, Any] = {"id": self.id, "type": self.config.type}
        if self.config.version is not None:
            found["version"] = self.config.version
        found["config"] = render_expressions(self.config.config)
        found.update(render_expressions(self._fields))
        return found


Source = WorkflowNode[Any, Any] | NodePort
"""Start of a connection: a port, or a node by its port `output`."""


class Workflow:
    """Workflow that is built node by node, for `client.workflows.apply` and `put`.

    ```python
    with Workflow("Thumbnails") as w:
        start = w.trigger(n.webhook())
        small = w.add(n.acme_resize(image=start.data.body.file), after=start)
        w.add(n.log(message="tiny"), after=small.port("too-small"))
    ```

    The functions of `n` are those of `pilotflame pull`. Nodes get ids by their types, unless `id` names them.
    """

    def __init__(
        self,
        name: str,
        *,
        description: str | None = None,
        status: Status | None = None,
        tags: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.nodes: dict[str, WorkflowNode[Any, Any]] = {}
        self._connections: list[dict[str, str]] = []
        self._fields = {
            "description": description,
            "status": status,
            "tags": None if tags is None else list(tags),
            "settings": settings,
            "config": config,
        }

    def __repr__(self) -> str:
        return f"<Workflow {self.name!r} with {len(self.nodes)} nodes>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def trigger(
        self,
        config: TriggerConfig[Port, Output_co],
        *,
        id: str | None = None,  # noqa: A002 - the name of the API
        label: str | None = None,
    ) -> WorkflowNode[Port, Output_co]:
        """Add a trigger node to the workflow, and return it; its output is the `data` of the returned node.

        An `id` of None is made from the type; a `label` of None is left out. Raises `ValueError` for an id
        that another node has.
        """
        return self._place(config, id, {"label": label})

    def add(  # noqa: PLR0913 - a parameter for each field of a node
        self,
        config: NodeConfig[Port, Output_co],
        *,
        after: Source | Sequence[Source] | Mapping[str, Source] | None = None,
        id: str | None = None,  # noqa: A002 - the name of the API
        label: str | None = None,
        input_mappings: Mapping[str, Any] | None = None,
        pass_through_values: Mapping[str, str] | None = None,
        retry: int | Mapping[str, Any] | None = None,
        timeout: float | None = None,
        at_most_once: bool | None = None,
    ) -> WorkflowNode[Port, Output_co]:
        """Add a node behind one or several others; a mapping names the input port for each of them.

        `retry` is the most attempts, or an object with `maxAttempts`, `backoff`, `maxDelay` and `jitter`. Raises
        `ValueError` for an id that another node has, for nodes of another workflow, and for wrong ports.
        """
        fields = {
            "label": label,
            "inputMappings": input_mappings,
            "passThroughValues": pass_through_values,
            "retry": {"maxAttempts": retry} if isinstance(retry, int) else retry,
            "timeout": timeout,
            "atMostOnce": at_most_once,
        }
        sources = [(self._require_ports(source, config, port), port) for source, port in _list_sources(after)]
        placed = self._place(config, id, fields)
        for source, port in sources:
            self.connect(source, placed, port=port)
        return placed

    def connect(self, source: Source, target: WorkflowNode[Any, Any], *, port: str = INPUT) -> None:
        """Add a connection to the input port of a node.

        Raises `ValueError` for nodes of another workflow, and for a port that the node type does not have.
        """
        output = self._require_ports(source, target.config, port)
        self._require_own(target)
        connection = {"source": output.node.id, "target": target.id}
        if output.name != OUTPUT:
            connection["sourcePort"] = output.name
        if port != INPUT:
            connection["targetPort"] = port
        self._connections.append(connection)

    def definition(self) -> dict[str, Any]:
        """Return the workflow as JSON, the same for the same calls."""
        found: dict[str, Any] = {"name": self.name}
        found.update({name: value for name, value in self._fields.items() if value is not None})
        found["nodes"] = [one.definition() for one in self.nodes.values()]
        found["connections"] = [dict(one) for one in self._connections]
        return found

    def _place(
        self, config: NodeConfig[Port, Output_co], node_id: str | None, fields: Mapping[str, Any]
    ) -> WorkflowNode[Port, Output_co]:
        """Add a node with this id, or with one made from its type, and return it;
        raises `ValueError` if the id is taken.
        """
        if node_id is not None and node_id in self.nodes:
            raise ValueError(f"Two nodes have the id {node_id!r}")
        placed = WorkflowNode(node_id or self._free_id(config.type), config, fields)
        self.nodes[placed.id] = placed
        return placed

    def _free_id(self, type_name: str) -> str:
        """Return an unused id made from the node type: `resize`, then `resize-2`."""
        stem = re.sub(r"[^A-Za-z0-9_-]", "-", type_name.rpartition("/")[2])
        number, found = 1, stem
        while found in self.nodes:
            number += 1
            found = f"{stem}-{number}"
        return found

    def _require_ports(self, source: Source, target: NodeConfig[Any, Any], port: str) -> NodePort:
        """Return the output port of a connection; raises `ValueError` for a wrong one, and for a wrong input port."""
        output = source if isinstance(source, NodePort) else source.default_port()
        self._require_own(output)
        if target.inputs is not None and port not in target.inputs:
            names = ", ".join(target.inputs) or "none"
            raise ValueError(f"{target.type} has no input port {port!r}: it has {names}")
        return output

    def _require_own(self, source: Source) -> None:
        """Raise `ValueError` for a node, or a port of a node, that is not of this workflow."""
        node = source.node if isinstance(source, NodePort) else source
        if self.nodes.get(node.id) is not node:
            raise ValueError(f"{node!r} is no node of the workflow {self.name!r}")


def _list_sources(
    after: Source | Sequence[Source] | Mapping[str, Source] | None,
) -> list[tuple[Source, str]]:
    """Return the sources of connections, each with the input port of the new node that it leads to."""
    if after is None:
        return []
    if isinstance(after, Mapping):
        return [(source, port) for port, source in after.items()]
    if isinstance(after, (WorkflowNode, NodePort)):
        return [(after, INPUT)]
    return [(source, INPUT) for source in after]
