"""A whole mesh as child processes: which there are, in what order they start and drain, and who restarts them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random

import anyio
import httpx
from anyio.abc import TaskGroup

from covey.cli.child import Child, ChildSpec
from covey.cli.files import MeshFiles
from covey.cli.kept_nats import KeptNats, kept_nats
from covey.clock import Clock, MonotonicClock
from covey.errors import CoveyError, DeadlineExceeded, InvalidArgument, Unavailable
from covey.retry import Backoff

START_TIMEOUT_S = 180.0
READY_POLL_S = 0.05
GRACE_S = 15.0
RESTARTS_MAX = 5
RESTART_WINDOW_S = 60.0
EXIT_BAD_CONFIG = 2
EXIT_MISSING_DEPENDENCY = 3
# Consumers drain before what they consume: no stream loses the service under it.
DRAIN_ORDER = ("agentflow", "gateway", "prefill", "decode", "semcache", "kvstore")

Report = Callable[[str, str], None]
"""Told about each child by name: `starting`, `ready …`, `exited …`, `restarting`, `drained`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """What to start: `models` maps public names to sources; each gets its own prefill and decode workers."""

    files: MeshFiles
    models: Mapping[str, str]
    remotes: Mapping[str, str] = field(default_factory=dict)
    prefill: int = 1
    decode: int = 1
    kvstore: int = 1
    http_port: int = 0
    settings: tuple[str, ...] = ()
    environments: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """More environment for single children, by name: failpoints, mostly."""
    restart: bool = True

    def __post_init__(self) -> None:
        for text in self.settings:
            if text.partition(".")[0] not in DRAIN_ORDER or "=" not in text:
                roles = ", ".join(DRAIN_ORDER)
                raise InvalidArgument(f"--set {text}: write SERVICE.KEY=VALUE with one of {roles}", field="set")

    def children(self) -> tuple[ChildSpec, ...]:
        """Every service process, named `role-index` (and the model where there are several)."""
        specs = [self._spec("kvstore", f"kvstore-{i}") for i in range(self.kvstore)]
        specs.append(self._spec("semcache", "semcache-0"))
        for model, source in self.models.items():
            suffix = f"-{model}" if len(self.models) > 1 else ""
            flags = ("--set", f"model={source}", "--set", f"model_name={model}")
            specs += [self._spec("prefill", f"prefill-{i}{suffix}", flags) for i in range(self.prefill)]
            specs += [self._spec("decode", f"decode-{i}{suffix}", flags) for i in range(self.decode)]
        edges = ("--set", f"http_listen=127.0.0.1:{self.http_port}", "--set", "grpc_listen=127.0.0.1:0")
        specs.append(self._spec("gateway", "gateway-0", edges))
        specs.append(self._spec("agentflow", "agentflow-0"))
        return tuple(specs)

    def _spec(self, role: str, name: str, flags: tuple[str, ...] = ()) -> ChildSpec:
        settings = tuple(flag for text in self._settings_of(role) for flag in ("--set", text))
        return ChildSpec(
            name=name,
            module=f"services.{role}",
            flags=("--config", str(self.files.config), "--set", f"worker={name}", *flags, *settings),
            environment=self.environments.get(name, {}),
        )

    def _settings_of(self, role: str) -> list[str]:
        """`--set decode.drain_s=5` of the launcher is `--set drain_s=5` of each decode service."""
        return [text.removeprefix(f"{role}.") for text in self.settings if text.startswith(f"{role}.")]


class Mesh:
    """A running mesh: its children by name."""

    def __init__(self, plan: MeshPlan, nats: KeptNats, report: Report, clock: Clock) -> None:
        self.plan = plan
        self.nats = nats
        self.children: dict[str, Child] = {}
        self._report = report
        self._clock = clock
        self._draining = False

    @property
    def http(self) -> str:
        """Base URL of the OpenAI-compatible endpoint."""
        return f"http://{self.children['gateway-0'].addresses['http']}"

    @property
    def grpc(self) -> str:
        return self.children["gateway-0"].addresses["grpc"]

    @property
    def flow(self) -> str:
        return self.children["agentflow-0"].addresses["grpc"]

    @property
    def semcache(self) -> str:
        """Of the semantic cache; empty when the mesh has none."""
        child = self.children.get("semcache-0")
        return child.addresses.get("grpc", "") if child is not None else ""

    async def start(self, tasks: TaskGroup) -> None:
        """Start all children at once and wait until the gateway has a worker for every model.

        Raises:
            CoveyError: a child could not start; the message says why.
        """
        failures: list[CoveyError] = []

        async def one(spec: ChildSpec) -> None:
            try:
                await self._start(spec)
            except CoveyError as error:
                failures.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for spec in self.plan.children():
                group.start_soon(one, spec)
        if failures:
            raise failures[0]
        await self._until_serving()
        for child in list(self.children.values()):
            tasks.start_soon(self._watch, child.spec)

    async def _start(self, spec: ChildSpec) -> None:
        self._report(spec.name, "starting")
        began = self._clock.now()
        child = await Child.start(spec, self.plan.files.log(spec.name), timeout_s=START_TIMEOUT_S)
        self.children[spec.name] = child
        self._report(spec.name, f"ready in {self._clock.now() - began:.1f} s")

    async def _until_serving(self) -> None:
        try:
            with anyio.fail_after(START_TIMEOUT_S):
                async with httpx.AsyncClient(trust_env=False) as client:
                    while (await client.get(f"{self.http}/readyz")).status_code != httpx.codes.OK:  # noqa: ASYNC110 - no event crosses processes
                        await anyio.sleep(READY_POLL_S)
        except TimeoutError as error:
            raise DeadlineExceeded("the gateway found no worker for every model: see its log") from error

    async def _watch(self, spec: ChildSpec) -> None:
        """Restart a child that crashed, within a budget; a child that cannot work ends the mesh."""
        crashes: list[float] = []
        backoff, rng = Backoff(), Random()  # noqa: S311 - jitter, not a secret
        while True:
            code = await self.children[spec.name].process.wait()
            if self._draining:
                return
            self._report(spec.name, f"exited with code {code}")
            if not self.plan.restart:
                return
            now = self._clock.now()
            crashes = [at for at in crashes if at > now - RESTART_WINDOW_S] + [now]
            if code in {EXIT_BAD_CONFIG, EXIT_MISSING_DEPENDENCY} or len(crashes) > RESTARTS_MAX:
                raise Unavailable(
                    f"{spec.name} does not stay up (exit code {code}):\n{self.children[spec.name].tail()}"
                )
            await anyio.sleep(backoff.delay_s(len(crashes), rng))
            await self._start(self._on_its_ports(spec))

    def _on_its_ports(self, spec: ChildSpec) -> ChildSpec:
        """A restarted gateway listens where its clients know it."""
        if spec.name != "gateway-0":
            return spec
        edges = ("--set", f"http_listen={self.http.removeprefix('http://')}", "--set", f"grpc_listen={self.grpc}")
        return replace(spec, flags=(*spec.flags, *edges))

    def leave_children(self) -> None:
        """From here on an ended child is not restarted."""
        self._draining = True

    async def drain(self) -> None:
        """Stop every child, consumers first; what does not drain in time is killed."""
        self.leave_children()
        for role in DRAIN_ORDER:
            async with anyio.create_task_group() as group:
                for name, child in self.children.items():
                    if child.spec.module == f"services.{role}":
                        group.start_soon(self._stop, name, child)

    async def _stop(self, name: str, child: Child) -> None:
        code = await child.stop(grace_s=GRACE_S)
        self._report(name, "drained" if code == 0 else f"ended with code {code}")


@asynccontextmanager
async def running(plan: MeshPlan, *, report: Report = lambda _name, _state: None) -> AsyncIterator[Mesh]:
    """Start a mesh, yield it, and drain it on the way out, whatever happened.

    Raises:
        CoveyError: it could not start, or a child does not stay up.
    """
    clock = MonotonicClock()
    async with kept_nats(plan.files.run_dir, report) as nats:
        server = nats.running
        plan.files.write(
            nats_url=server.url, nats_token_file=server.token_file, remotes=plan.remotes, models=plan.models
        )
        mesh = Mesh(plan, nats, report, clock)
        try:
            async with anyio.create_task_group() as tasks:
                await mesh.start(tasks)
                try:
                    yield mesh
                finally:
                    mesh.leave_children()
                    tasks.cancel_scope.cancel()
        except* CoveyError as group:
            raise group.exceptions[0] from group
        finally:
            with anyio.CancelScope(shield=True):
                await mesh.drain()
