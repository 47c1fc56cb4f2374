"""Tasks: their states, their bounds, and SCRUB at a real node."""

from __future__ import annotations

import anyio
import pytest

from covey.codec.methods import KvStore
from covey.errors import NoSpace, NotFound, Overloaded, Unimplemented
from covey.net.rpc import Channel
from covey.testing import assert_eventually, virtual_time
from covey.types.kv_state import QuotaRequest, StartTask, TaskKind, TaskRequest, TaskState, TaskStatus
from services.kvstore.tasks import Progress, Tasks
from tests.contract.kv_stores import StoreProcess, flip_byte
from tests.contract.test_block_store import chain, content, find, key, names, put
from tests.support.kv_state import stats

from .connection import connected

SCRUB = StartTask(kind=TaskKind.SCRUB)


@virtual_time
async def test_a_task_tells_how_far_it_is_and_ends_in_its_state() -> None:
    go = anyio.Event()

    async def work(request: StartTask, progress: Progress) -> str:
        progress.expect(3)
        progress.step(2)
        await go.wait()
        if request.kind is TaskKind.MOVE:
            raise NoSpace("no room there")
        progress.step()
        return "all good"

    async with anyio.create_task_group() as tg:
        tasks = Tasks(tg, {TaskKind.SCRUB: work, TaskKind.MOVE: work})
        done, failed = tasks.start(SCRUB).task, tasks.start(StartTask(kind=TaskKind.MOVE)).task
        await anyio.sleep(1)
        assert tasks.get(done) == TaskStatus(task=done, kind=TaskKind.SCRUB, state=TaskState.RUNNING, done=2, total=3)
        go.set()
        await anyio.sleep(1)
        assert (tasks.get(done).state, tasks.get(done).done, tasks.get(done).why) == (TaskState.DONE, 3, "all good")
        assert (tasks.get(failed).state, tasks.get(failed).why) == (TaskState.FAILED, "no room there")
        assert tasks.running == 0
        with pytest.raises(Unimplemented):
            tasks.start(StartTask(kind=TaskKind.DRAIN))


@virtual_time
async def test_a_task_is_cancelled_runs_out_of_time_or_crashes_alone() -> None:
    async def sleep(_: StartTask, __: Progress) -> str:
        await anyio.sleep(10)
        return ""

    async def crash(_: StartTask, __: Progress) -> str:
        raise ZeroDivisionError

    async with anyio.create_task_group() as tg:
        tasks = Tasks(tg, {TaskKind.SCRUB: sleep, TaskKind.RECODE: crash})
        cancelled, late = tasks.start(SCRUB).task, tasks.start(StartTask(kind=TaskKind.SCRUB, deadline_s=2.0)).task
        crashed = tasks.start(StartTask(kind=TaskKind.RECODE)).task
        await anyio.sleep(1)
        tasks.cancel(cancelled)
        await anyio.sleep(2)
        assert [tasks.get(task).state for task in (cancelled, late, crashed)] == [
            TaskState.CANCELLED, TaskState.FAILED, TaskState.FAILED,
        ]  # fmt: skip
        assert "ZeroDivision" not in tasks.get(crashed).why
        assert tasks.cancel(cancelled).state is TaskState.CANCELLED


@virtual_time
async def test_tasks_are_bounded_in_number_running_and_remembered() -> None:
    async def sleep(_: StartTask, __: Progress) -> str:
        await anyio.sleep(1)
        return ""

    async with anyio.create_task_group() as tg:
        tasks = Tasks(tg, {TaskKind.SCRUB: sleep}, running_max=2, remembered_max=3)
        first = tasks.start(SCRUB).task
        tasks.start(SCRUB)
        with pytest.raises(Overloaded):
            tasks.start(SCRUB)
        for _ in range(3):
            await anyio.sleep(2)
            newest = tasks.start(SCRUB).task
        with pytest.raises(NotFound):
            tasks.get(first)
        assert tasks.get(newest).state is TaskState.RUNNING


async def finished(channel: Channel, request: StartTask) -> TaskStatus:
    status = await channel.call(KvStore.START, request, timeout_s=5)

    async def ended() -> bool:
        nonlocal status
        status = await channel.call(KvStore.GET_TASK, TaskRequest(task=status.task), timeout_s=5)
        return status.state is not TaskState.RUNNING

    await assert_eventually(ended, 10.0)
    return status


async def test_scrub_finds_a_flipped_bit_before_a_reader_does(fresh: StoreProcess) -> None:
    async with connected(fresh) as (client, channel):
        where, blocks = key(), chain(4)
        await (await put(client, where, blocks, content(4))).release()
        clean = await finished(channel, SCRUB)
        assert (clean.state, clean.done, clean.total) == (TaskState.DONE, 4, 4)
        assert clean.why == "4 blocks verified, 0 quarantined"

        held = await find(client, where, blocks)
        offset = held.locations[2].offset  # type: ignore[attr-defined]
        await held.release()
        await anyio.to_thread.run_sync(flip_byte, fresh.arena, offset + 4096)
        dirty = await finished(channel, StartTask(kind=TaskKind.SCRUB, namespace=where.namespace))
        assert dirty.why.endswith("1 quarantined")
        assert (await find(client, where, blocks)).hashes == tuple(names(blocks)[:2]), "and what grows from it is gone"
        after = await stats(channel)
        assert (after.quarantined, after.blocks) == (1, 2)
        named = StartTask(kind=TaskKind.SCRUB, namespace=where.namespace, hashes=tuple(names(blocks)))
        assert (await finished(channel, named)).why == "2 blocks verified, 0 quarantined"


async def test_a_quota_is_told_set_and_kept(fresh: StoreProcess) -> None:
    async with connected(fresh) as (client, channel):
        where = key()
        await (await put(client, where, chain(2), content(2))).release()
        told = await channel.call(KvStore.QUOTA, QuotaRequest(tenant=where.tenant), timeout_s=5)
        assert told.quota_bytes == 0
        assert told.used_bytes == (await stats(channel)).used_bytes > 0
        half = QuotaRequest(tenant=where.tenant, quota_bytes=told.used_bytes)
        assert (await channel.call(KvStore.QUOTA, half, timeout_s=5)).quota_bytes == told.used_bytes
        await (await put(client, where, chain(2), content(2))).release()
        after = await channel.call(KvStore.QUOTA, QuotaRequest(tenant=where.tenant), timeout_s=5)
        assert after.used_bytes <= told.used_bytes
        assert (await stats(channel)).evictions == 2, "its own blocks went"
