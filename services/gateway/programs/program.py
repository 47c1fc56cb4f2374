"""One program in memory: its graph, the values and errors of its variables, and who waits for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import anyio

from covey.errors import CoveyError, DeadlineExceeded, InvalidArgument, NoSpace, NotFound, from_code
from covey.policy import template
from covey.policy.dag import CallState, Graph, Node
from covey.policy.deduction import Purpose, deduce, more_urgent
from covey.types.ids import CallId, ProgramId, TenantId, WorkerId
from covey.types.program import Message, Objective, SemanticCall, VariableValue

_NO_PURPOSE = Purpose(objective=Objective())


class Program:
    """State and waiting; `Programs` runs the calls. Nothing here fails silently: a failed call wakes every waiter."""

    def __init__(
        self,
        program_id: ProgramId,
        tenant: TenantId,
        *,
        key: str,
        ttl_s: float,
        deadline_at: float,
        calls_max: int,
        bytes_max: int,
    ) -> None:
        self.program_id = program_id
        self.tenant = tenant
        self.key = key
        self.ttl_s = ttl_s
        self.deadline_at = deadline_at
        self.graph = Graph(calls_max)
        self.calls: dict[CallId, SemanticCall] = {}
        self.values: dict[str, VariableValue] = {}
        self.errors: dict[str, CoveyError] = {}
        self.worker = WorkerId("")
        """The decode worker that ran the last call: its prefix is likely there."""
        self.expires_at = 0.0
        self.size_bytes = 0
        self._bytes_max = bytes_max
        self._wanted: dict[str, Objective] = {}
        self._purposes: dict[CallId, Purpose] | None = None
        self._partial: dict[str, list[str]] = {}
        self._acked: set[str] = set()
        self._forgotten: set[str] = set()
        self._events: dict[str, anyio.Event] = {}

    def submit(
        self, calls: Sequence[SemanticCall], nodes: Sequence[Node], variables: Mapping[str, str]
    ) -> tuple[tuple[CallId, ...], tuple[CallId, ...]]:
        """Add calls and values; returns (accepted, known). A value that is already there unchanged is no error.

        Raises what `Graph.add` does, and NoSpace when the program holds too much text.
        """
        fresh_values = {n: v for n, v in variables.items() if not self._has(n, v)}
        self._check_forgotten(nodes)
        size = sum(len(v) for v in fresh_values.values()) + sum(_size(c) for c in calls)
        self._make_room(size)
        fresh, known = self.graph.add(nodes, fresh_values)
        self._purposes = None
        by_id = {call.call_id: call for call in calls}
        for name, text in fresh_values.items():
            self._keep(VariableValue(name=name, value=text))
        for node in fresh:
            self.calls[node.call_id] = by_id[node.call_id]
            self.size_bytes += _size(by_id[node.call_id])
        for node in fresh:
            broken = next((name for name in node.inputs if name in self.errors), None)
            if broken is not None and self.graph.state(node.call_id) is CallState.WAITING:
                self.fail(node.call_id, _upstream_error(node, broken, self.errors[broken]))
        return tuple(node.call_id for node in fresh), known

    def set(self, name: str, text: str) -> None:
        """Give a variable its value. Raises AlreadyExists when it has another, or a call produces it."""
        if self._has(name, text):
            return
        self._make_room(len(text))
        self.graph.set(name)
        self._keep(VariableValue(name=name, value=text))

    def messages(self, call: SemanticCall) -> tuple[Message, ...]:
        """The call's prompt with its inputs put in."""
        values = {name: self.values[name].value for name in self.graph.nodes[call.call_id].inputs}
        return tuple(replace(m, content=template.render(m.content, values)) for m in call.messages)

    def purpose(self, call_id: CallId) -> Purpose:
        """What the call is for, as deduced from what is awaited now."""
        if self._purposes is None:
            self._purposes = deduce(self.graph, self._wanted)
        return self._purposes.get(call_id, _NO_PURPOSE)

    def startable(self) -> list[CallId]:
        """Calls that could run now, the most urgent first, among equals those with the longest way to go."""
        ready = [(self.purpose(c), i, c) for i, c in enumerate(self.graph.startable())]
        return [c for p, i, c in sorted(ready, key=lambda r: (-r[0].priority, -r[0].depth, r[1]))]

    def append(self, variable: str, text: str) -> None:
        """A running call produced more of its output."""
        self._partial.setdefault(variable, []).append(text)
        self._notify(variable)

    def finish(self, value: VariableValue) -> None:
        """A running call produced all of its output."""
        self.graph.finish(value.call_id)
        self._purposes = None
        self._keep(value)

    def fail(self, call_id: CallId, error: CoveyError) -> None:
        """A call failed: everything downstream does too, and whoever waits for any of it is woken."""
        self._purposes = None
        root = self.graph.nodes[call_id]
        for failed in self.graph.fail(call_id):
            node = self.graph.nodes[failed]
            self.errors[node.output] = error if failed == call_id else _upstream_error(node, root.output, error)
            self._partial.pop(node.output, None)
            self._notify(node.output)

    def want(self, name: str, objective: Objective) -> None:
        """Somebody waits for `name`; a more urgent wish raises all that is upstream. Raises NotFound."""
        if name in self._forgotten:
            raise NotFound(f"variable {name!r} was acknowledged and forgotten", field="name")
        if not self.graph.knows(name):
            raise NotFound(f"no variable {name!r} in this program", field="name")
        before = self._wanted.get(name)
        self._wanted[name] = objective if before is None else more_urgent(before, objective)
        if self._wanted[name] != before:
            self._purposes = None

    async def wait(self, name: str, timeout_s: float) -> VariableValue:
        """The value, once it is there. Raises what its call failed with, or DeadlineExceeded."""
        with anyio.move_on_after(timeout_s):
            while True:
                value = self.peek(name)
                if value is not None:
                    return value
                await self.changed(name)
        value = self.peek(name)
        if value is None:
            raise DeadlineExceeded(f"variable {name!r} has no value after {timeout_s:g} s", field="timeout_s")
        return value

    def peek(self, name: str) -> VariableValue | None:
        """The value if it is there. Raises what its call failed with."""
        error = self.errors.get(name)
        if error is not None:
            raise _copy(error)
        return self.values.get(name)

    def partial(self, name: str) -> Sequence[str]:
        """The pieces of a value that is being produced."""
        return self._partial.get(name, ())

    async def changed(self, name: str) -> None:
        """Wait until a piece, the value or the error of `name` arrives."""
        await self._events.setdefault(name, anyio.Event()).wait()

    def ack(self, names: Iterable[str]) -> None:
        """These values are journaled: they may be forgotten when room is needed. Unknown names are ignored."""
        self._acked |= {name for name in names if name in self.values}

    def unfinished(self) -> list[CallId]:
        return [c for c in self.calls if self.graph.state(c) in (CallState.WAITING, CallState.RUNNING)]

    def _has(self, name: str, text: str) -> bool:
        value = self.values.get(name)
        return value is not None and value.value == text and not value.call_id

    def _keep(self, value: VariableValue) -> None:
        self.values[value.name] = value
        self.size_bytes += len(value.value)
        self._partial.pop(value.name, None)
        self._notify(value.name)

    def _notify(self, name: str) -> None:
        event = self._events.pop(name, None)
        if event is not None:
            event.set()

    def _make_room(self, size: int) -> None:
        for name in sorted(self._acked):
            if self.size_bytes + size <= self._bytes_max:
                return
            states = {self.graph.state(c) for c in self.graph.consumers(name)}
            if not states & {CallState.WAITING, CallState.RUNNING}:
                self.size_bytes -= len(self.values.pop(name).value)
                self._acked.discard(name)
                self._forgotten.add(name)
        if self.size_bytes + size > self._bytes_max:
            raise NoSpace(f"a program may hold {self._bytes_max} characters of text", field="variables")

    def _check_forgotten(self, nodes: Sequence[Node]) -> None:
        for i, node in enumerate(nodes):
            gone = next((name for name in node.inputs if name in self._forgotten), None)
            if gone is not None and node.call_id not in self.graph.nodes:
                raise InvalidArgument(
                    f"call {node.call_id!r} names variable {gone!r}, which was acknowledged and forgotten",
                    field=f"calls[{i}].messages",
                )


def _size(call: SemanticCall) -> int:
    return sum(len(m.content) for m in call.messages)


def _upstream_error(node: Node, variable: str, error: CoveyError) -> CoveyError:
    text = f"call {node.call_id!r} needs variable {variable!r}, which failed: {error.message}"
    return from_code(error.code, text[:512], field=error.field)


def _copy(error: CoveyError) -> CoveyError:
    """Every waiter gets an error of its own: a raised one carries its raiser's traceback."""
    return from_code(error.code, error.message, field=error.field, retry_after_ms=error.retry_after_ms)
