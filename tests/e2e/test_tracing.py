"""What a mesh tells of itself: one trace through all services, metrics that parse, logs without content."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.from_thread
import httpx
import pytest
from opentelemetry import trace
from prometheus_client.parser import text_string_to_metric_families

from covey.cli.mesh import Mesh
from covey.net.call import extracted
from covey.net.nats import NatsBus
from covey.testing import assert_eventually
from tests.support.meshes import TINY, chat_body, client_of, mesh_of
from tests.support.otlp import Collector, collector

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SPLIT = ("gateway.routing.split=always",)
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SECRET = "the quick brown okapi"
EXPORT_S = 20.0

KEY_METRICS = {
    "gateway-0": {"covey_requests", "covey_time_to_first_token_seconds", "covey_inter_token_latency_seconds"},
    "prefill-0": {"covey_engine"},
    "decode-0": {"covey_engine"},
    "kvstore-0": {"covey_kvstore"},
    "semcache-0": {"covey_semcache_lookups", "covey_semcache_entries"},
    "agentflow-0": {"covey_agentflow_open_runs", "covey_agentflow_tool_workers"},
}


@pytest.fixture(scope="module")
def seen() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, seen: Collector) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("tracing")
    base = folder / "covey.toml"
    base.write_text(f'[common]\notlp_endpoint = "{seen.endpoint}"\n')
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mesh_of(folder, base=base, settings=SPLIT)) as mesh,
    ):
        yield mesh


async def _chat(mesh: Mesh, **headers: str) -> httpx.Response:
    async with client_of(mesh) as client:
        reply = await client.post(
            "/v1/chat/completions", json=chat_body(TINY, f"{SECRET} " * 6, max_tokens=8), headers=headers
        )
    assert reply.status_code == httpx.codes.OK, reply.text
    assert reply.json()["covey"]["split"]
    return reply


async def test_one_request_is_one_trace_through_gateway_prefill_and_decode(mesh: Mesh, seen: Collector) -> None:
    await _chat(mesh, traceparent=TRACEPARENT)
    services = {"covey-gateway", "covey-prefill", "covey-decode"}
    await assert_eventually(lambda: services <= {s.service for s in seen.trace(TRACE_ID)}, timeout_s=EXPORT_S)
    spans = {span.name: span for span in seen.trace(TRACE_ID)}
    edge = spans["POST /v1/chat/completions"]
    assert (edge.service, edge.parent_id) == ("covey-gateway", PARENT_ID)
    for name, service in (("covey.v1.Prefill/Generate", "covey-prefill"), ("covey.v1.Decode/Generate", "covey-decode")):
        assert (spans[name].service, spans[name].parent_id) == (service, edge.span_id)
    assert {span.attributes["covey.code"] for span in (edge, *spans.values())} == {"OK"}
    took = spans["covey.v1.Decode/Generate"].attributes
    assert 0 < float(took["covey.kv_wait_s"]) <= float(took["covey.lookup_s"]) + float(took["covey.transfer_s"]) + 0.01
    assert not [span for span in seen.spans if SECRET in repr(span)]


async def test_a_refused_request_is_a_span_with_its_code(mesh: Mesh, seen: Collector) -> None:
    trace_id = TRACE_ID.replace("4", "5")
    async with client_of(mesh) as client:
        headers = {"traceparent": TRACEPARENT.replace(TRACE_ID, trace_id)}
        reply = await client.post("/v1/chat/completions", json=chat_body("nobody", SECRET), headers=headers)
    assert reply.status_code == httpx.codes.NOT_FOUND
    await assert_eventually(lambda: seen.trace(trace_id), timeout_s=EXPORT_S)
    assert [span.attributes["covey.code"] for span in seen.trace(trace_id)] == ["NOT_FOUND"]


async def test_the_trace_crosses_nats_too(mesh: Mesh) -> None:
    common = tomllib.loads(mesh.plan.files.config.read_text())["common"]
    token = Path(common["nats_token_file"]).read_text().strip()
    async with NatsBus.open(common["nats"], token=token) as bus, bus.subscribe("covey.test.trace") as messages:
        with extracted({"traceparent": TRACEPARENT}):
            await bus.publish("covey.test.trace", b"{}")
        await bus.publish("covey.test.trace", b"{}")
        with anyio.fail_after(5):
            inside, outside = await anext(messages), await anext(messages)
    assert inside.headers["traceparent"] == TRACEPARENT
    assert "traceparent" not in outside.headers
    with extracted(inside.headers):
        assert trace.format_trace_id(trace.get_current_span().get_span_context().trace_id) == TRACE_ID


async def test_metrics_of_each_service_parse_and_hold_what_matters(mesh: Mesh) -> None:
    await _chat(mesh)
    async with httpx.AsyncClient(trust_env=False) as client:
        for name, child in mesh.children.items():
            text = (await client.get(f"http://{child.addresses['metrics']}/metrics")).text
            families = {family.name: family for family in text_string_to_metric_families(text)}
            assert KEY_METRICS[name] | {"process_resident_memory_bytes"} <= set(families), name
        at_edge = (await client.get(f"{mesh.http}/metrics")).text
    requests = next(f for f in text_string_to_metric_families(at_edge) if f.name == "covey_requests")
    done = [s for s in requests.samples if s.labels == {"model": TINY, "code": "OK"} and s.name.endswith("_total")]
    assert done[0].value >= 1


async def test_logs_are_json_with_request_ids_and_without_content(mesh: Mesh) -> None:
    reply = await _chat(mesh, **{"x-request-id": "trace-me-1", "traceparent": TRACEPARENT})
    answer = reply.json()["choices"][0]["message"]["content"]
    texts = {name: mesh.plan.files.log(name).read_text() for name in mesh.children}
    records = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}
    assert all(records.values())
    own = [r for r in records["gateway-0"] if str(r.get("request_id", "")).startswith("trace-me-1")]
    assert own
    assert own[-1]["trace_id"] == TRACE_ID
    for name, text in texts.items():
        assert SECRET not in text, name
        assert answer not in text, name


async def test_without_an_endpoint_nothing_is_sent(tmp_path: Path) -> None:
    with collector() as unasked:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": unasked.endpoint}
        environments = dict.fromkeys(KEY_METRICS, environment)
        async with mesh_of(tmp_path, settings=SPLIT, environments=environments) as mesh:
            await _chat(mesh, traceparent=TRACEPARENT)
        assert unasked.spans == ()
