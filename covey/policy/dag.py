"""The graph of a program: calls, the variables between them, what is ready, and what a failure takes with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from covey.errors import AlreadyExists, InvalidArgument, Overloaded
from covey.types.ids import CallId

CALLS_MAX = 10_000


class CallState(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A call as the graph sees it. `digest` stands for its whole body."""

    call_id: CallId
    inputs: tuple[str, ...]
    output: str
    digest: bytes = b""


class Graph:
    """Calls over variables: grows by validated batches; each call starts once, when all its inputs have values."""

    def __init__(self, calls_max: int = CALLS_MAX) -> None:
        self._calls_max = calls_max
        self._nodes: dict[CallId, Node] = {}
        self._state: dict[CallId, CallState] = {}
        self._producer: dict[str, CallId] = {}
        self._consumers: dict[str, list[CallId]] = {}
        self._ready: set[str] = set()
        self._missing: dict[CallId, int] = {}
        self._startable: dict[CallId, None] = {}

    @property
    def nodes(self) -> Mapping[CallId, Node]:
        return self._nodes

    def state(self, call_id: CallId) -> CallState:
        return self._state[call_id]

    def producer(self, variable: str) -> CallId | None:
        """The call that sets `variable`, or None when a client does."""
        return self._producer.get(variable)

    def consumers(self, variable: str) -> tuple[CallId, ...]:
        return tuple(self._consumers.get(variable, ()))

    def knows(self, variable: str) -> bool:
        """Whether `variable` has a value or a call that will give it one."""
        return variable in self._ready or variable in self._producer

    def has_value(self, variable: str) -> bool:
        return variable in self._ready

    def add(
        self, nodes: Iterable[Node], variables: Collection[str] = ()
    ) -> tuple[tuple[Node, ...], tuple[CallId, ...]]:
        """Add calls and variables that have values now; returns (new calls, calls that were known already).

        Nothing is added when anything is wrong.

        Raises:
            InvalidArgument: a call id twice, two producers of one variable, an input that nothing produces, or a cycle;
                the message names call and variable, the field is `calls[i]…`.
            AlreadyExists: a known call id with another body, or a value for a variable that has one or will have.
            Overloaded: more calls than a program may hold.
        """
        batch = list(nodes)
        fresh = [n for n in batch if n.call_id not in self._nodes]
        known = [n for n in batch if n.call_id in self._nodes]
        self._check_ids(batch, known)
        self._check_names(batch, fresh, variables)
        _check_cycles(batch, {n.output: n for n in fresh})
        for name in variables:
            self._set(name)
        for node in fresh:
            self._insert(node)
        return tuple(fresh), tuple(n.call_id for n in known)

    def startable(self) -> tuple[CallId, ...]:
        """Waiting calls whose inputs all have values, in the order that they became so."""
        return tuple(self._startable)

    def start(self, call_id: CallId) -> None:
        """A startable call begins to run."""
        assert self._missing.pop(call_id) == 0
        del self._startable[call_id]
        self._state[call_id] = CallState.RUNNING

    def set(self, variable: str) -> None:
        """A client gives `variable` its value.

        Raises:
            AlreadyExists: it has one, or a call will produce it.
        """
        self._check_settable(variable)
        self._set(variable)

    def finish(self, call_id: CallId) -> None:
        """A running call produced its output."""
        assert self._state[call_id] is CallState.RUNNING
        self._state[call_id] = CallState.DONE
        self._set(self._nodes[call_id].output)

    def fail(self, call_id: CallId) -> tuple[CallId, ...]:
        """A waiting or running call fails, and with it every call downstream; returns all that failed now."""
        failed: list[CallId] = []
        todo = [call_id]
        while todo:
            current = todo.pop()
            if self._state[current] in (CallState.DONE, CallState.FAILED):
                continue
            self._state[current] = CallState.FAILED
            self._missing.pop(current, None)
            self._startable.pop(current, None)
            failed.append(current)
            todo += self._consumers.get(self._nodes[current].output, ())
        return tuple(failed)

    def check(self) -> None:
        """Invariants; raises AssertionError."""
        for call_id, node in self._nodes.items():
            missing = sum(name not in self._ready for name in node.inputs)
            state = self._state[call_id]
            assert (call_id in self._missing) == (state is CallState.WAITING)
            assert state is not CallState.WAITING or self._missing[call_id] == missing
            assert (call_id in self._startable) == (state is CallState.WAITING and missing == 0)
            assert state not in (CallState.RUNNING, CallState.DONE) or missing == 0
            assert (node.output in self._ready) == (state is CallState.DONE)
            assert self._producer[node.output] == call_id

    def _insert(self, node: Node) -> None:
        self._nodes[node.call_id] = node
        self._producer[node.output] = node.call_id
        for name in node.inputs:
            self._consumers.setdefault(name, []).append(node.call_id)
        self._state[node.call_id] = CallState.WAITING
        self._missing[node.call_id] = sum(name not in self._ready for name in node.inputs)
        if self._missing[node.call_id] == 0:
            self._startable[node.call_id] = None

    def _set(self, variable: str) -> None:
        self._ready.add(variable)
        for consumer in self._consumers.get(variable, ()):
            if consumer in self._missing:
                self._missing[consumer] -= 1
                if self._missing[consumer] == 0:
                    self._startable[consumer] = None

    def _check_ids(self, batch: list[Node], known: list[Node]) -> None:
        seen: set[CallId] = set()
        for i, node in enumerate(batch):
            if node.call_id in seen:
                raise InvalidArgument(f"call {node.call_id!r} is in the batch twice", field=f"calls[{i}].call_id")
            seen.add(node.call_id)
        for node in known:
            if self._nodes[node.call_id].digest != node.digest:
                raise AlreadyExists(f"call {node.call_id!r} is known with another body", field="calls")
        if len(self._nodes) + len(batch) - len(known) > self._calls_max:
            raise Overloaded(f"a program holds at most {self._calls_max} calls", field="calls")

    def _check_names(self, batch: list[Node], fresh: list[Node], variables: Collection[str]) -> None:
        index = {n.call_id: i for i, n in enumerate(batch)}
        produced: dict[str, CallId] = {}
        for node in fresh:
            field = f"calls[{index[node.call_id]}]"
            other = produced.get(node.output) or self._producer.get(node.output)
            if other is not None:
                raise InvalidArgument(
                    f"calls {other!r} and {node.call_id!r} both produce variable {node.output!r}",
                    field=f"{field}.output",
                )
            if node.output in self._ready or node.output in variables:
                raise InvalidArgument(
                    f"call {node.call_id!r} produces variable {node.output!r}, which has a value",
                    field=f"{field}.output",
                )
            produced[node.output] = node.call_id
        for name in variables:
            self._check_settable(name)
        for node in fresh:
            for name in node.inputs:
                if not (name in produced or name in variables or self.knows(name)):
                    raise InvalidArgument(
                        f"call {node.call_id!r} names variable {name!r}, which nothing produces",
                        field=f"calls[{index[node.call_id]}].messages",
                    )

    def _check_settable(self, variable: str) -> None:
        if variable in self._producer:
            producer = self._producer[variable]
            raise AlreadyExists(f"variable {variable!r} is produced by call {producer!r}", field=variable)
        if variable in self._ready:
            raise AlreadyExists(f"variable {variable!r} has a value", field=variable)


def _check_cycles(batch: list[Node], by_output: Mapping[str, Node]) -> None:
    """Kahn's algorithm over the new calls; older calls cannot depend on them, since inputs must be known when added."""
    waits = {n.call_id: sum(name in by_output for name in set(n.inputs)) for n in by_output.values()}
    consumers: dict[str, list[Node]] = {}
    for node in by_output.values():
        for name in set(node.inputs):
            consumers.setdefault(name, []).append(node)
    todo = [n for n in by_output.values() if waits[n.call_id] == 0]
    while todo:
        node = todo.pop()
        for consumer in consumers.get(node.output, ()):
            waits[consumer.call_id] -= 1
            if waits[consumer.call_id] == 0:
                todo.append(consumer)
    stuck = {call_id for call_id, n in waits.items() if n > 0}
    if stuck:
        i, node, name = _on_cycle(batch, by_output, stuck)
        raise InvalidArgument(
            f"call {node.call_id!r} waits for itself through variable {name!r}", field=f"calls[{i}].messages"
        )


def _on_cycle(batch: list[Node], by_output: Mapping[str, Node], stuck: set[CallId]) -> tuple[int, Node, str]:
    """Walk upstream from any stuck call until one repeats: that one lies on a cycle."""
    node = next(n for n in batch if n.call_id in stuck)
    seen: set[CallId] = set()
    while True:
        name = next(i for i in node.inputs if i in by_output and by_output[i].call_id in stuck)
        if node.call_id in seen:
            return next(i for i, n in enumerate(batch) if n is node), node, name
        seen.add(node.call_id)
        node = by_output[name]
