"""Every RPC of the mesh as a typed value: `Channel.call(KvStore.LOOKUP, request)` knows what comes back.

A test holds this table equal to the services in `proto/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from covey.codec.chunks import decode_chunk, encode_chunk
from covey.codec.messages import PACKAGE, decode, encode
from covey.types import flow, generate, kv, kv_state, lend, program, semcache
from covey.types.common import Empty

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, R]):
    """One RPC: its service, name and the types on both sides. `*_name` names the oneof message of a union."""

    service: str
    name: str
    request: Any
    reply: Any
    request_name: str | None = None
    reply_name: str | None = None

    @property
    def path(self) -> str:
        return f"/{PACKAGE}.{self.service}/{self.name}"

    def encode_request(self, value: Q) -> bytes:
        return encode(value, self.request_name)

    def decode_request(self, data: bytes) -> Q:
        value: Q = decode(self.request, data, self.request_name)
        return value

    def encode_reply(self, value: R) -> bytes:
        return encode(value, self.reply_name)

    def decode_reply(self, data: bytes) -> R:
        value: R = decode(self.reply, data, self.reply_name)
        return value


class Unary(Method[Q, R]):
    """One request, one reply."""


class ServerStream(Method[Q, R]):
    """One request, many replies."""


class ClientStream(Method[Q, R]):
    """Many requests, one reply."""


class BidiStream(Method[Q, R]):
    """Many requests and many replies, independent of each other."""


class ChunkStream(ServerStream[Q, kv.BlockChunk]):
    """A stream of pieces of blocks, whose bytes are not copied to encode and decode them."""

    def encode_reply(self, value: kv.BlockChunk) -> bytes:
        return encode_chunk(value)

    def decode_reply(self, data: bytes) -> kv.BlockChunk:
        return decode_chunk(kv.BlockChunk, data)


class ChunkUpload(ClientStream[kv.WriteChunk, R]):
    """An upload of pieces of blocks, whose bytes are not copied to encode and decode them."""

    def encode_request(self, value: kv.WriteChunk) -> bytes:
        return encode_chunk(value)

    def decode_request(self, data: bytes) -> kv.WriteChunk:
        return decode_chunk(kv.WriteChunk, data)


class Prefill:
    INFO: Final[Unary[Empty, generate.EngineInfo]] = Unary("Prefill", "Info", Empty, generate.EngineInfo)
    GENERATE: Final[ServerStream[generate.GenerateRequest, generate.Event]] = ServerStream(
        "Prefill", "Generate", generate.GenerateRequest, generate.Event, reply_name="Event"
    )
    CANCEL: Final[Unary[generate.CancelRequest, Empty]] = Unary("Prefill", "Cancel", generate.CancelRequest, Empty)
    LOAD: Final[Unary[Empty, generate.EngineLoad]] = Unary("Prefill", "Load", Empty, generate.EngineLoad)
    DRAIN: Final[Unary[Empty, Empty]] = Unary("Prefill", "Drain", Empty, Empty)


class Decode:
    INFO: Final[Unary[Empty, generate.EngineInfo]] = Unary("Decode", "Info", Empty, generate.EngineInfo)
    GENERATE: Final[ServerStream[generate.GenerateRequest, generate.Event]] = ServerStream(
        "Decode", "Generate", generate.GenerateRequest, generate.Event, reply_name="Event"
    )
    CANCEL: Final[Unary[generate.CancelRequest, Empty]] = Unary("Decode", "Cancel", generate.CancelRequest, Empty)
    LOAD: Final[Unary[Empty, generate.EngineLoad]] = Unary("Decode", "Load", Empty, generate.EngineLoad)
    DRAIN: Final[Unary[Empty, Empty]] = Unary("Decode", "Drain", Empty, Empty)
    RETAIN: Final[Unary[generate.RetainRequest, generate.RetainReply]] = Unary(
        "Decode", "Retain", generate.RetainRequest, generate.RetainReply
    )
    EXPORT: Final[Unary[generate.ExportRequest, generate.HandoverTicket]] = Unary(
        "Decode", "Export", generate.ExportRequest, generate.HandoverTicket
    )
    ADOPT: Final[Unary[generate.AdoptRequest, generate.AdoptReply]] = Unary(
        "Decode", "Adopt", generate.AdoptRequest, generate.AdoptReply
    )
    LEND: Final[ClientStream[lend.LendChunk, lend.LendReply]] = ClientStream(
        "Decode", "Lend", lend.LendChunk, lend.LendReply
    )
    ATTEND: Final[Unary[lend.AttendRequest, lend.AttendReply]] = Unary(
        "Decode", "Attend", lend.AttendRequest, lend.AttendReply
    )
    RETURN: Final[Unary[lend.ReturnRequest, Empty]] = Unary("Decode", "Return", lend.ReturnRequest, Empty)


class KvStore:
    INFO: Final[Unary[Empty, kv.StoreInfo]] = Unary("KvStore", "Info", Empty, kv.StoreInfo)
    LOOKUP: Final[Unary[kv.LookupRequest, kv.LookupReply]] = Unary(
        "KvStore", "Lookup", kv.LookupRequest, kv.LookupReply
    )
    RESERVE: Final[Unary[kv.ReserveRequest, kv.ReserveReply]] = Unary(
        "KvStore", "Reserve", kv.ReserveRequest, kv.ReserveReply
    )
    WRITE: Final[ClientStream[kv.WriteChunk, kv.WriteReply]] = ChunkUpload(
        "KvStore", "Write", kv.WriteChunk, kv.WriteReply
    )
    COMMIT: Final[Unary[kv.CommitRequest, kv.CommitReply]] = Unary(
        "KvStore", "Commit", kv.CommitRequest, kv.CommitReply
    )
    ABORT: Final[Unary[kv.LeaseRequest, Empty]] = Unary("KvStore", "Abort", kv.LeaseRequest, Empty)
    GET: Final[ServerStream[kv.GetRequest, kv.BlockChunk]] = ChunkStream("KvStore", "Get", kv.GetRequest, kv.BlockChunk)
    RENEW: Final[Unary[kv.RenewRequest, kv.LeaseGrant]] = Unary("KvStore", "Renew", kv.RenewRequest, kv.LeaseGrant)
    RELEASE: Final[Unary[kv.LeaseRequest, Empty]] = Unary("KvStore", "Release", kv.LeaseRequest, Empty)
    PIN: Final[Unary[kv.PinRequest, kv.PinReply]] = Unary("KvStore", "Pin", kv.PinRequest, kv.PinReply)
    QUARANTINE: Final[Unary[kv.QuarantineRequest, Empty]] = Unary("KvStore", "Quarantine", kv.QuarantineRequest, Empty)
    WATCH: Final[ServerStream[kv_state.WatchKvRequest, kv_state.KvEvent]] = ServerStream(
        "KvStore", "Watch", kv_state.WatchKvRequest, kv_state.KvEvent
    )
    SNAPSHOT: Final[ServerStream[Empty, kv_state.KvSnapshot]] = ServerStream(
        "KvStore", "Snapshot", Empty, kv_state.KvSnapshot
    )
    STATS: Final[Unary[Empty, kv_state.StoreStats]] = Unary("KvStore", "Stats", Empty, kv_state.StoreStats)
    START: Final[Unary[kv_state.StartTask, kv_state.TaskStatus]] = Unary(
        "KvStore", "Start", kv_state.StartTask, kv_state.TaskStatus
    )
    GET_TASK: Final[Unary[kv_state.TaskRequest, kv_state.TaskStatus]] = Unary(
        "KvStore", "GetTask", kv_state.TaskRequest, kv_state.TaskStatus
    )
    CANCEL_TASK: Final[Unary[kv_state.TaskRequest, kv_state.TaskStatus]] = Unary(
        "KvStore", "CancelTask", kv_state.TaskRequest, kv_state.TaskStatus
    )
    QUOTA: Final[Unary[kv_state.QuotaRequest, kv_state.QuotaReply]] = Unary(
        "KvStore", "Quota", kv_state.QuotaRequest, kv_state.QuotaReply
    )


class Inference:
    CHAT: Final[ServerStream[program.ChatRequest, program.CompletionEvent]] = ServerStream(
        "Inference", "Chat", program.ChatRequest, program.CompletionEvent, reply_name="CompletionEvent"
    )
    COMPLETE: Final[ServerStream[program.CompleteRequest, program.CompletionEvent]] = ServerStream(
        "Inference",
        "Complete",
        program.CompleteRequest,
        program.CompletionEvent,
        reply_name="CompletionEvent",
    )
    EMBED: Final[Unary[program.EmbedRequest, program.EmbedReply]] = Unary(
        "Inference", "Embed", program.EmbedRequest, program.EmbedReply
    )
    MODELS: Final[Unary[Empty, program.ModelList]] = Unary("Inference", "Models", Empty, program.ModelList)


class Programs:
    OPEN: Final[Unary[program.OpenProgram, program.ProgramHandle]] = Unary(
        "Programs", "Open", program.OpenProgram, program.ProgramHandle
    )
    SUBMIT: Final[Unary[program.SubmitCalls, program.SubmitReply]] = Unary(
        "Programs", "Submit", program.SubmitCalls, program.SubmitReply
    )
    SET: Final[Unary[program.SetVariable, Empty]] = Unary("Programs", "Set", program.SetVariable, Empty)
    GET: Final[Unary[program.GetVariable, program.VariableValue]] = Unary(
        "Programs", "Get", program.GetVariable, program.VariableValue
    )
    STREAM: Final[ServerStream[program.GetVariable, program.VariableEvent]] = ServerStream(
        "Programs", "Stream", program.GetVariable, program.VariableEvent, reply_name="VariableEvent"
    )
    ACK: Final[Unary[program.AckValues, Empty]] = Unary("Programs", "Ack", program.AckValues, Empty)
    FORK: Final[Unary[program.ProgramRequest, program.ProgramHandle]] = Unary(
        "Programs", "Fork", program.ProgramRequest, program.ProgramHandle
    )
    CANCEL: Final[Unary[program.CancelCalls, Empty]] = Unary("Programs", "Cancel", program.CancelCalls, Empty)
    CLOSE: Final[Unary[program.ProgramRequest, Empty]] = Unary("Programs", "Close", program.ProgramRequest, Empty)


class SemCache:
    LOOKUP: Final[Unary[semcache.CacheQuery, semcache.CacheReply]] = Unary(
        "SemCache", "Lookup", semcache.CacheQuery, semcache.CacheReply
    )
    OFFER: Final[Unary[semcache.CacheOffer, semcache.OfferReply]] = Unary(
        "SemCache", "Offer", semcache.CacheOffer, semcache.OfferReply
    )
    FEEDBACK: Final[Unary[semcache.FeedbackRequest, Empty]] = Unary(
        "SemCache", "Feedback", semcache.FeedbackRequest, Empty
    )
    INVALIDATE: Final[Unary[semcache.InvalidateRequest, semcache.InvalidateReply]] = Unary(
        "SemCache", "Invalidate", semcache.InvalidateRequest, semcache.InvalidateReply
    )
    EXPLAIN: Final[Unary[semcache.CacheQuery, semcache.CacheExplanation]] = Unary(
        "SemCache", "Explain", semcache.CacheQuery, semcache.CacheExplanation
    )
    EMBED: Final[Unary[program.EmbedRequest, program.EmbedReply]] = Unary(
        "SemCache", "Embed", program.EmbedRequest, program.EmbedReply
    )
    STATS: Final[Unary[Empty, semcache.CacheStats]] = Unary("SemCache", "Stats", Empty, semcache.CacheStats)
    ABANDON: Final[Unary[semcache.AbandonRequest, Empty]] = Unary("SemCache", "Abandon", semcache.AbandonRequest, Empty)
    WATCH: Final[ServerStream[semcache.WatchCacheRequest, semcache.CacheEvent]] = ServerStream(
        "SemCache", "Watch", semcache.WatchCacheRequest, semcache.CacheEvent
    )
    EXPORT: Final[ServerStream[semcache.ExportCache, semcache.CacheRecord]] = ServerStream(
        "SemCache", "Export", semcache.ExportCache, semcache.CacheRecord
    )
    WARM: Final[ClientStream[semcache.CacheRecord, semcache.WarmReply]] = ClientStream(
        "SemCache", "Warm", semcache.CacheRecord, semcache.WarmReply
    )
    ROUTE: Final[Unary[semcache.RouteQuery, semcache.RouteReply]] = Unary(
        "SemCache", "Route", semcache.RouteQuery, semcache.RouteReply
    )
    LEARN: Final[Unary[semcache.RouteOutcome, Empty]] = Unary("SemCache", "Learn", semcache.RouteOutcome, Empty)


class Flow:
    SUBMIT: Final[Unary[flow.SubmitRun, flow.RunHandle]] = Unary("Flow", "Submit", flow.SubmitRun, flow.RunHandle)
    GET: Final[Unary[flow.RunRequest, flow.RunView]] = Unary("Flow", "Get", flow.RunRequest, flow.RunView)
    LIST: Final[Unary[flow.ListRuns, flow.RunList]] = Unary("Flow", "List", flow.ListRuns, flow.RunList)
    WAIT: Final[Unary[flow.WaitRun, flow.RunView]] = Unary("Flow", "Wait", flow.WaitRun, flow.RunView)
    WATCH: Final[ServerStream[flow.WatchRun, flow.FlowEvent]] = ServerStream(
        "Flow", "Watch", flow.WatchRun, flow.FlowEvent
    )
    SIGNAL: Final[Unary[flow.SignalRun, Empty]] = Unary("Flow", "Signal", flow.SignalRun, Empty)
    APPROVE: Final[Unary[flow.ApproveRun, Empty]] = Unary("Flow", "Approve", flow.ApproveRun, Empty)
    CANCEL: Final[Unary[flow.RunRequest, flow.RunView]] = Unary("Flow", "Cancel", flow.RunRequest, flow.RunView)
    FORK: Final[Unary[flow.ForkRun, flow.RunHandle]] = Unary("Flow", "Fork", flow.ForkRun, flow.RunHandle)


class Tools:
    ATTACH: Final[BidiStream[flow.ToolWorkerMessage, flow.ToolServerMessage]] = BidiStream(
        "Tools",
        "Attach",
        flow.ToolWorkerMessage,
        flow.ToolServerMessage,
        request_name="ToolWorkerMessage",
        reply_name="ToolServerMessage",
    )


SERVICES: Final = (Prefill, Decode, KvStore, Inference, Programs, SemCache, Flow, Tools)


def methods_of(service: type) -> tuple[Method[Any, Any], ...]:
    """All methods declared by one of `SERVICES`, in order."""
    return tuple(v for v in vars(service).values() if isinstance(v, Method))
