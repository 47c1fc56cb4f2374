"""The workflow builder: nodes by name, references by value, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from covey.errors import InvalidArgument
from covey.policy import template
from covey.policy.workflow import graph
from covey.types import flow
from covey.types.flow import LlmNode, Node, RetryPolicy, ToolNode
from covey.types.program import CacheMode, CallParams, Message

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ref:
    """A node's or input's value-to-be: put it into f-strings and arguments, it becomes `{{name}}`."""

    name: str

    def __str__(self) -> str:
        return "{{" + self.name + "}}"


class Refs(tuple[Ref, ...]):
    """Several references, in order; in an f-string they stand one below the other."""

    __slots__ = ()

    def joined(self, separator: str) -> str:
        """Return a template of all values with `separator` between them."""
        return separator.join(str(ref) for ref in self)

    def __str__(self) -> str:
        return self.joined("\n")


Prompt = str | Ref | Sequence[Message | Mapping[str, Any]]
After = Iterable[Ref | str]


class Workflow:
    """A graph of llm calls and tool calls. `build` checks it; `client.submit` builds and starts it."""

    def __init__(self, name: str, *, version: str = "1") -> None:
        self.name = name
        self.version = version
        self._nodes: dict[str, Node] = {}
        self._constants: dict[str, str] = {}
        self._outputs: list[str] = []

    def input(self, name: str) -> Ref:
        """Name a value that `submit` is given."""
        return Ref(name)

    def text(self, text: str) -> Ref:
        """Put a fixed text in whose braces are only braces; shared by all nodes that name it."""
        name = f"text_{len(self._constants) + 1}"
        self._constants[name] = text
        return Ref(name)

    def llm(
        self,
        node_id: str,
        prompt: Prompt,
        *,
        system: str = "",
        model: str = "",
        cache: CacheMode = CacheMode.USE,
        after: After = (),
        timeout_s: float = 0.0,
        retry: RetryPolicy | None = None,
        **params: Any,
    ) -> Ref:
        """Add a semantic call; `prompt` is a template, or messages whose contents are.

        `params` are those of `covey.types.program.CallParams`. Raises `InvalidArgument` for a double id or a wrong
        parameter.
        """
        try:
            sampling = CallParams(**params)
        except TypeError as error:
            raise InvalidArgument(f"node {node_id!r}: {error}", field=f"workflow.nodes.{node_id}") from error
        work = LlmNode(messages=_messages(prompt, system), model=model, params=sampling, cache=cache)
        return self._add(node_id, work, after, timeout_s, retry)

    def tool(
        self,
        node_id: str,
        tool: str,
        *,
        after: After = (),
        timeout_s: float = 0.0,
        retry: RetryPolicy | None = None,
        expected_s: float = 0.0,
        arguments: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Ref:
        """Add a call of an attached tool; arguments are templates, references, or values written as JSON.

        An argument whose name is taken here goes into `arguments`. `expected_s` tells how long it is likely to run.
        """
        texts = {name: _argument(value) for name, value in {**(arguments or {}), **more}.items()}
        work = ToolNode(tool=tool, arguments=texts, expected_s=expected_s)
        return self._add(node_id, work, after, timeout_s, retry)

    def map(self, node_id: str, items: Iterable[Item], build: Callable[[str, Item], Ref]) -> Refs:
        """Add a branch for each item: `build(branch id, item)` adds its nodes and returns its last one."""
        return Refs(build(f"{node_id}_{i}", item) for i, item in enumerate(items))

    def output(self, *refs: Ref | str) -> None:
        """Name results; without any, the nodes that no other node needs are."""
        self._outputs += [_name(ref) for ref in refs]

    def build(self, inputs: Mapping[str, str] | None = None) -> tuple[flow.Workflow, dict[str, str]]:
        """Check and return what is sent: the workflow, and all inputs.

        Raises:
            InvalidArgument: a cycle, an unknown reference, a double or bad name; names node and variable.
        """
        given = {**self._constants, **(inputs or {})}
        built = flow.Workflow(
            name=self.name, version=self.version, nodes=tuple(self._nodes.values()), outputs=tuple(self._outputs)
        )
        graph(built, given)
        return built, given

    def _add(
        self, node_id: str, work: LlmNode | ToolNode, after: After, timeout_s: float, retry: RetryPolicy | None
    ) -> Ref:
        if node_id in self._nodes:
            raise InvalidArgument(f"two nodes have the id {node_id!r}", field=f"workflow.nodes.{node_id}")
        if not template.is_name(node_id):
            raise InvalidArgument(
                f"node name {node_id!r}: use a letter or _, then letters, digits, _ . and -, 128 at most",
                field=f"workflow.nodes.{node_id}",
            )
        names = tuple(_name(ref) for ref in after)
        self._nodes[node_id] = Node(id=node_id, work=work, after=names, timeout_s=timeout_s, retry=retry)
        return Ref(node_id)


def _messages(prompt: Prompt, system: str) -> tuple[Message, ...]:
    head = (Message(role="system", content=system),) if system else ()
    if isinstance(prompt, str | Ref):
        return (*head, Message(role="user", content=str(prompt)))
    try:
        return (*head, *(item if isinstance(item, Message) else Message(**item) for item in prompt))
    except TypeError as error:
        raise InvalidArgument("a message has a `role` and a `content`", field="messages") from error


def _argument(value: Any) -> str:
    if isinstance(value, str | Ref | Refs):
        return str(value)
    return msgspec.json.encode(value).decode()


def _name(ref: Ref | str) -> str:
    return ref.name if isinstance(ref, Ref) else ref
