"""A service as a process: flags, configuration, signals, logs, metrics, exit codes; `Runtime` carries every effect."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from hashlib import blake2b
from importlib import import_module, metadata
from pathlib import Path
from random import Random
from typing import NoReturn, TypeVar

import anyio
from structlog.typing import FilteringBoundLogger

from covey import failpoint
from covey.auth import MeshToken
from covey.clock import Clock, MonotonicClock
from covey.config import CommonConfig, Loaded, load, render
from covey.errors import InvalidArgument, Unavailable
from covey.net.bus import Bus
from covey.net.call import sole
from covey.net.metrics import serve_metrics
from covey.net.process import boot_id, die_with_parent
from covey.net.registry import Announcement, Registry, announce
from covey.net.rpc import Channels, Handlers, Server, serve
from covey.secretfile import read_secret
from covey.telemetry import Metrics, Tracing, new_log, stdlib_logs_to
from covey.types.event import WorkerRecord, WorkerState
from covey.types.generate import EngineInfo, EngineLoad, Role
from covey.types.ids import WorkerId
from covey.types.kv import StoreInfo

C = TypeVar("C", bound=CommonConfig)
Serve = Callable[[C, "Runtime"], Awaitable[None]]

EXIT_DRAINED, EXIT_CRASHED, EXIT_CONFIG, EXIT_DEPENDENCY = range(4)
WILDCARD_HOSTS = ("0.0.0.0", "[::]", "::")  # noqa: S104 - recognised, never bound unasked


class Runtime:
    """What a service stands on. Build it with `Runtime.open`; `run` does for real processes."""

    def __init__(
        self, config: CommonConfig, *, name: str, channels: Channels, tracing: Tracing, metrics: Metrics,
        log: FilteringBoundLogger, worker: WorkerId, mesh_token: MeshToken | None,
        nats_token: str | None, metrics_address: str,
        clock: Clock, rng: Random, failpoints: failpoint.Failpoints | None, ready_fd: int | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.clock = clock
        self.rng = rng
        self.metrics = metrics
        self.tracing = tracing
        self.log = log
        self.worker = worker
        self.epoch = int(clock.wall() * 1000)
        """Grows with every start of a process: milliseconds since 1970 at its start."""
        self.host = boot_id()
        self.run_dir = Path(config.run_dir)
        self.mesh_token = mesh_token
        self.metrics_address = metrics_address
        self.channels = channels
        self.failpoints = failpoints
        self.is_ready = False
        self._config = config
        self._nats_token = nats_token
        self._ready_fd = ready_fd
        self._stopped = anyio.Event()
        self._addresses: list[str] = []

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: CommonConfig, *, name: str, ready_fd: int | None = None, clock: Clock | None = None,
        log: FilteringBoundLogger | None = None, failpoints: failpoint.Failpoints | None = None,
    ) -> AsyncIterator[Runtime]:  # fmt: skip
        """Own a runtime for a block.

        Raises:
            InvalidArgument: the run directory cannot be made, or the mesh token file cannot be read.
        """
        token, nats_token = await anyio.to_thread.run_sync(_prepare, config)
        worker = WorkerId(config.worker or f"{name}-{secrets.token_hex(4)}")
        metrics, tracing = Metrics(), Tracing(name, endpoint=config.otlp_endpoint)
        async with AsyncExitStack() as stack:
            stack.callback(tracing.close)
            metrics_address = await stack.enter_async_context(serve_metrics(config.metrics_listen, metrics))
            yield cls(
                config,
                name=name,
                channels=await stack.enter_async_context(Channels.open(token=token)),
                tracing=tracing,
                metrics=metrics,
                log=(log or new_log(name, stream=sys.stderr, level=config.log_level)).bind(worker=worker),
                worker=worker,
                mesh_token=token,
                nats_token=nats_token,
                metrics_address=metrics_address,
                clock=clock or MonotonicClock(),
                rng=Random(secrets.randbits(64)),  # noqa: S311 - jitter and sampling, not secrets
                failpoints=failpoints,
                ready_fd=ready_fd,
            )

    def bus(self) -> AbstractAsyncContextManager[Bus]:
        """Connect to NATS. Raises `Unavailable` when it is not there."""
        from covey.net.nats import NatsBus

        return NatsBus.open(self._config.nats, token=self._nats_token, name=self.worker, rng=self.rng)

    def registry(self, bus: Bus) -> AbstractAsyncContextManager[Registry]:
        """Watch who is in the mesh."""
        return Registry.open(bus, clock=self.clock)

    @asynccontextmanager
    async def serve_rpc(self, listen: str, handlers: Handlers, grace_s: float | None = None) -> AsyncIterator[Server]:
        """Serve with the mesh token; `grace_s` is the configured `drain_s` unless given."""
        grace_s = self._config.drain_s if grace_s is None else grace_s
        async with serve(
            listen, handlers, token=self.mesh_token, grace_s=grace_s, tracer=self.tracing.tracer
        ) as server:
            self._addresses.append(server.address)
            yield server

    def announce(
        self, bus: Bus, role: Role, address: str, *, engine: EngineInfo | None = None, store: StoreInfo | None = None,
        load: Callable[[], EngineLoad] = EngineLoad, labels: Mapping[str, str] | None = None,
    ) -> AbstractAsyncContextManager[Announcement]:  # fmt: skip
        """Register this process as READY and report its load each second; leaving the block withdraws it."""
        record = WorkerRecord(
            worker=self.worker,
            role=role,
            address=_reachable(address),
            epoch=self.epoch,
            state=WorkerState.READY,
            host=self.host,
            pid=os.getpid(),
            engine=engine,
            store=store,
            metrics_address=_reachable(self.metrics_address),
            labels=labels or {},
        )
        return announce(bus, record, load=load, clock=self.clock)

    async def ready(self, **addresses: str) -> None:
        """Tell the log, and whoever waits on `--ready-fd`, that this service takes work.

        The waiter reads one line: a JSON object of addresses, `grpc` and whatever else is given by name.
        """
        self.is_ready = True
        self.log.info("ready", addresses=self._addresses, metrics=self.metrics_address, epoch=self.epoch)
        if self._ready_fd is not None:
            said = {"grpc": next(iter(self._addresses), ""), "metrics": self.metrics_address, **addresses}
            os.write(self._ready_fd, json.dumps(said).encode() + b"\n")
            os.close(self._ready_fd)
            self._ready_fd = None

    async def until_stopped(self) -> None:
        """Wait for SIGTERM or SIGINT."""
        await self._stopped.wait()

    def stop(self) -> None:
        """Do as SIGTERM does."""
        self._stopped.set()


def run_service(package: str) -> NoReturn:
    """Run a service package (`serve` of its module `service`, `Config` of its module `config`) and end the process.

    It ends at once: what had to be done is done, and a thread amid a long import would hold the process up.
    """
    code = _run_package(package)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_package(package: str) -> int:
    """Import and run; returns the exit code.

    A package that is not installed is a missing dependency: exit code 3, naming the extra that has it.
    """
    name = package.rpartition(".")[2]
    try:
        config, service = import_module(f"{package}.config"), import_module(f"{package}.service")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in {"covey", "services"}:
            raise
        sys.stderr.write(f"covey {name}: the package {missing!r} is not installed: pip install 'covey[{name}]'\n")
        return EXIT_DEPENDENCY
    return run(service.serve, config.Config, name=name)


def run(serve: Serve[C], config: type[C], *, name: str, argv: Sequence[str] | None = None) -> int:
    """Run a service to its end and return the exit code: 0 drained, 1 crashed, 2 bad config, 3 dependency missing."""
    flags = _flags(name).parse_args(argv)
    try:
        loaded = load(
            config,
            file=flags.config,
            tables=("common", name),
            env=os.environ,
            prefix=f"COVEY_{name.upper()}__",
            sets=flags.set,
        )
        failpoints = failpoint.arm(os.environ.get("COVEY_FAILPOINTS", ""))
    except InvalidArgument as error:
        sys.stderr.write(f"covey {name}: {error.message}\n")
        return EXIT_CONFIG
    if flags.print_config:
        sys.stdout.write(render(loaded))
    if flags.check or flags.print_config:
        return EXIT_DRAINED
    parent = os.environ.get("COVEY_DIE_WITH_PARENT", "") if flags.die_with_parent is None else flags.die_with_parent
    if parent:
        die_with_parent(signal.SIGTERM, parent=int(parent) or None)
    with ExitStack() as stack:
        log = new_log(name, stream=sys.stderr, level=loaded.config.log_level)
        stack.enter_context(stdlib_logs_to(log))
        log.info("starting", version=_version(), config=_digest(loaded), pid=os.getpid())
        return anyio.run(_main, serve, loaded.config, name, log, failpoints, flags.ready_fd)


async def _main(
    serve: Serve[C], config: C, name: str, log: FilteringBoundLogger, failpoints: failpoint.Failpoints,
    ready_fd: int | None,
) -> int:  # fmt: skip
    rt: Runtime | None = None
    try:
        async with Runtime.open(config, name=name, ready_fd=ready_fd, log=log, failpoints=failpoints) as rt:
            async with anyio.create_task_group() as tg:
                await tg.start(_watch_signals, rt, tg.cancel_scope)
                await serve(config, rt)
                tg.cancel_scope.cancel()
    except Exception as error:  # noqa: BLE001 - the process ends here; the log has it all
        return _exit_code(error, log, started=rt is not None and rt.is_ready)
    log.info("stopped")
    return EXIT_DRAINED


async def _watch_signals(
    rt: Runtime, scope: anyio.CancelScope, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Drain at the first signal, or end a start-up that is not done. The same signal again ends the process at once.

    A terminal's SIGINT reaches the launcher too, whose SIGTERM follows: two different signals do not force.
    """
    seen: set[int] = set()
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            rt.log.info("stopping", signal=signal.Signals(number).name)
            if number in seen:
                os._exit(EXIT_CRASHED)
            seen.add(number)
            rt.stop()
            if not rt.is_ready:
                scope.cancel()


def _exit_code(error: Exception, log: FilteringBoundLogger, *, started: bool) -> int:
    cause = sole(error)
    if not started and isinstance(cause, InvalidArgument):
        log.error("bad configuration", reason=cause.message, field=cause.field)
        return EXIT_CONFIG
    if not started and isinstance(cause, Unavailable | ImportError):
        log.error("a dependency is missing", reason=str(cause))
        return EXIT_DEPENDENCY
    log.error("crashed", error=type(cause).__name__, exc_info=error)
    return EXIT_CRASHED


def _flags(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}", allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with [common] and this service's table")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit with 0 or 2")
    parser.add_argument("--print-config", action="store_true", help="show every setting and its source, and exit")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a JSON line of addresses here when ready")
    parser.add_argument(
        "--die-with-parent", nargs="?", const="0", metavar="PID", help="drain when the starting process (PID) dies"
    )
    return parser


def _prepare(config: CommonConfig) -> tuple[MeshToken | None, str | None]:
    """Make the run directory and read the secrets: the mesh token and NATS's."""
    try:
        Path(config.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot make the run directory {config.run_dir}: {error.strerror}"
        raise InvalidArgument(reason, field="run_dir") from error
    boot_id()
    mesh = MeshToken(read_secret(config.mesh_token_file)) if config.mesh_token_file else None
    return mesh, read_secret(config.nats_token_file) if config.nats_token_file else None


def _reachable(address: str) -> str:
    """Replace a wildcard by this host's name: what others can connect to."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if host in WILDCARD_HOSTS else address


def _digest(loaded: Loaded[C]) -> str:
    return blake2b(render(loaded).encode(), digest_size=6).hexdigest()


def _version() -> str:
    try:
        return metadata.version("covey")
    except metadata.PackageNotFoundError:
        return "source"
