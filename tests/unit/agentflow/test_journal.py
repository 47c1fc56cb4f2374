"""Journal and blobs: records survive as they were, one owner writes, damage is noticed."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.errors import DataCorrupt, Fenced, NoSpace, NotFound
from covey.net.embedded import EmbeddedNats
from covey.net.nats import NatsBus
from covey.policy.flow_event import (
    CancelRequested,
    FlowChange,
    NodeFailed,
    NodeRetried,
    NodeStarted,
    NodeSucceeded,
    RunEnded,
    Value,
)
from covey.types.flow import RunState, SubmitRun, Workflow
from covey.types.generate import Timings, Usage
from covey.types.ids import RunId, TenantId
from covey.types.program import CacheOutcome
from services.agentflow import record
from services.agentflow.blob import INLINE_BYTES_MAX, Blobs
from services.agentflow.journal import STREAM, SUBJECT, Journal
from services.agentflow.record import Created

TENANT = TenantId("local")
times = st.floats(0, 2e9)
texts = st.text(max_size=50)
events = st.lists(
    st.one_of(
        st.builds(NodeStarted, node=texts, at_s=times, submission=st.integers(1, 9)),
        st.builds(NodeRetried, node=texts, at_s=times, resume_at_s=times, code=texts, message=texts),
        st.builds(
            NodeSucceeded,
            node=texts,
            at_s=times,
            value=st.builds(Value, size_bytes=st.integers(0, 9), text=texts, blob=texts),
            usage=st.none() | st.builds(Usage, prompt_tokens=st.integers(0, 9)),
            timings=st.none() | st.builds(Timings, queue_s=times),
            cache=st.sampled_from(CacheOutcome),
            worker=texts,
        ),
        st.builds(NodeFailed, node=texts, at_s=times, code=texts, message=texts),
        st.builds(CancelRequested, at_s=times),
        st.builds(RunEnded, at_s=times, state=st.sampled_from(RunState), code=texts, message=texts),
    ),
    min_size=1,
)


@given(events)
def test_records_come_back_as_they_were(written: list[FlowChange]) -> None:
    assert record.decode(record.encode_changes(written, "me")) == tuple(written)


@given(st.binary(max_size=80))
def test_garbage_is_corrupt_and_nothing_else(payload: bytes) -> None:
    try:
        record.decode(payload)
    except DataCorrupt as error:
        assert error.field in {"journal", "schema"}  # noqa: PT017 - most garbage is refused, some is not


def test_a_record_of_a_later_schema_is_refused() -> None:
    created = Created(tenant=TENANT, digest=b"", created_s=0, workflow="w", schema=99)
    with pytest.raises(DataCorrupt, match="99"):
        record.decode(record.encode_created(created, "me"))


@given(st.lists(st.integers(0, INLINE_BYTES_MAX), max_size=60))
def test_parts_fit_the_bus_and_keep_everything(sizes: list[int]) -> None:
    written = [NodeSucceeded(node="n" * 128, at_s=1.0, value=Value(size_bytes=size, text="x" * size)) for size in sizes]
    parts = list(record.parts(written))
    assert [event for part in parts for event in part] == written
    assert all(len(record.encode_changes(part, "me")) < 256 * 1024 for part in parts)


def test_equal_requests_have_equal_digests_whatever_the_order_of_inputs() -> None:
    workflow = Workflow(name="w", nodes=())
    one = SubmitRun(workflow=workflow, inputs={"a": "1", "b": "2"})
    same = SubmitRun(workflow=workflow, inputs={"b": "2", "a": "1"})
    other = SubmitRun(workflow=workflow, inputs={"b": "2", "a": "3"})
    assert record.digest_of(one) == record.digest_of(same) != record.digest_of(other)


async def test_two_owners_never_both_write(tmp_path: Path) -> None:
    async with EmbeddedNats.start(tmp_path) as nats, NatsBus.open(nats.url, token=nats.token, rng=Random(1)) as bus:
        stream = await bus.stream(STREAM, (f"{SUBJECT}.*",), bytes_max=1024**2)
        mine, theirs = Journal(stream, owner="mine"), Journal(stream, owner="theirs")
        run, event = RunId("run-1"), [CancelRequested(at_s=1.0)]
        created = Created(tenant=TENANT, digest=b"d", created_s=0.0, workflow="w")
        first = await mine.create(run, created)
        assert await mine.create(run, created) == first, "repeating an append is safe"
        with pytest.raises(Fenced):
            await theirs.create(run, created)
        second = await theirs.append(run, event, last=first)
        assert await theirs.append(run, event, last=first) == second
        with pytest.raises(Fenced):
            await mine.append(run, event, last=first)
        await mine.create(RunId("run-2"), created)
        assert [(name, seq) async for name, seq, _ in mine.read()] == [("run-1", 1), ("run-1", 2), ("run-2", 3)]
        assert [seq async for _, seq, _ in theirs.read(run)] == [first, second]
        await mine.forget(run)
        assert [name async for name, _, _ in mine.read()] == ["run-2"]


async def test_blobs_are_checked_and_apart_by_tenant(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    small, text = "x" * INLINE_BYTES_MAX, "é" * INLINE_BYTES_MAX
    assert (await blobs.store(TENANT, small)).text == small
    value = await blobs.store(TENANT, text)
    assert (value.text, value.size_bytes) == ("", 2 * INLINE_BYTES_MAX)
    assert await blobs.load(TENANT, value) == text
    assert await blobs.store(TENANT, text) == value
    with pytest.raises(NotFound):
        await blobs.load(TenantId("other"), value)
    with pytest.raises(NotFound):
        await blobs.get(TENANT, "../../etc/passwd")
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(b"damaged")
    with pytest.raises(DataCorrupt):
        await blobs.load(TENANT, value)


async def test_a_blob_store_without_a_directory_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoSpace):
        await Blobs(tmp_path / "file").put(TENANT, b"x")
