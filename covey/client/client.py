"""The client of a mesh: programs at the gateway, workflows at agentflow, tools of one's own."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Self

from anyio import to_thread

from covey.auth import MeshToken
from covey.client.endpoints import running_mesh
from covey.client.program import Program, opened
from covey.client.run import Run
from covey.client.tool import Tool
from covey.client.tool_worker import ToolWorker, serving
from covey.client.workflow import Workflow
from covey.codec.methods import Flow, Inference
from covey.errors import FailedPrecondition, InvalidArgument, Unavailable
from covey.net.rpc import Channel
from covey.types.common import Empty
from covey.types.flow import ListRuns, RunState, RunView, SubmitRun
from covey.types.ids import RunId
from covey.types.program import ModelCard

RPC_TIMEOUT_S = 30.0


class Client:
    """Use it as `async with Client.connect(…) as client`. Nothing is sent before the first call."""

    def __init__(self, gateway: Channel | None, flow: Channel | None) -> None:
        self._gateway = gateway
        self._flow = flow

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, *, gateway: str = "", flow: str = "", api_key: str = "", run_dir: Path | str | None = None
    ) -> AsyncIterator[Self]:
        """Reach a mesh by the `host:port` of its gateway and its agentflow, either of which may be left out.

        Without both, a mesh that `covey up` started on this machine is found: by `run_dir`, `$COVEY_RUN_DIR` (which
        `covey run` sets), `$COVEY_HOME/run` or `~/.covey/run`.

        Raises:
            Unavailable: no mesh runs there.
            InvalidArgument: no API key, or a malformed one.
        """
        if not gateway and not flow:
            mesh = await to_thread.run_sync(running_mesh, run_dir)
            gateway, flow, api_key = mesh.grpc, mesh.flow, api_key or await to_thread.run_sync(mesh.api_key)
        if not api_key:
            raise InvalidArgument(
                "an API key is needed: it stands in the file `api_key_file` of the mesh", field="api_key"
            )
        token = MeshToken(api_key)
        async with AsyncExitStack() as stack:
            yield cls(
                await stack.enter_async_context(Channel.open(gateway, token=token)) if gateway else None,
                await stack.enter_async_context(Channel.open(flow, token=token)) if flow else None,
            )

    async def models(self) -> tuple[ModelCard, ...]:
        """Return the models of this mesh."""
        return (await self._at_gateway().call(Inference.MODELS, Empty(), timeout_s=RPC_TIMEOUT_S)).models

    def program(
        self, *, model: str = "", deadline_s: float = 0.0, idempotency_key: str = ""
    ) -> AbstractAsyncContextManager[Program]:
        """Open a program for a block: semantic functions called inside it share a fate, and their KV.

        `model` is for functions that name none. With an `idempotency_key` the same program is opened again.
        """
        return opened(self._at_gateway(), model=model, deadline_s=deadline_s, idempotency_key=idempotency_key)

    async def submit(
        self,
        workflow: Workflow,
        inputs: Mapping[str, str] | None = None,
        *,
        idempotency_key: str = "",
        deadline_s: float = 0.0,
    ) -> Run:
        """Start a run. One key with one body is one run, however often it is submitted.

        Raises:
            InvalidArgument: the workflow is wrong; names node and variable. Nothing was sent.
            AlreadyExists: the key was used for another workflow or other inputs.
        """
        built, given = workflow.build(inputs)
        request = SubmitRun(
            # A key of our own makes a repeated submit safe, should the reply be lost.
            idempotency_key=idempotency_key or f"sdk-{secrets.token_hex(16)}",
            workflow=built,
            inputs=given,
            deadline_s=deadline_s,
        )
        channel = self._at_flow()
        try:
            handle = await channel.call(Flow.SUBMIT, request, timeout_s=RPC_TIMEOUT_S)
        except Unavailable:
            handle = await channel.call(Flow.SUBMIT, request, timeout_s=RPC_TIMEOUT_S)
        return Run(channel, handle.run_id, existing=handle.existing)

    def run(self, run_id: str) -> Run:
        """Return a handle of a run that exists."""
        return Run(self._at_flow(), RunId(run_id), existing=True)

    async def runs(self, *, state: RunState | None = None, limit: int = 100) -> tuple[RunView, ...]:
        """Return the youngest runs, without their nodes."""
        request = ListRuns(state=state, limit=limit)
        return (await self._at_flow().call(Flow.LIST, request, timeout_s=RPC_TIMEOUT_S)).runs

    def serve_tools(self, tools: Sequence[Tool], *, worker: str = "") -> AbstractAsyncContextManager[ToolWorker]:
        """Offer tools to this tenant's runs for a block, in this process; it starts once they are attached."""
        return serving(self._at_flow(), tools, worker=worker)

    def _at_gateway(self) -> Channel:
        if self._gateway is None:
            raise FailedPrecondition("this client knows no gateway: connect with gateway=…", field="gateway")
        return self._gateway

    def _at_flow(self) -> Channel:
        if self._flow is None:
            raise FailedPrecondition("this client knows no agentflow: connect with flow=…", field="flow")
        return self._flow
