"""What the gateway counts: vLLM's meanings under the prefix `covey_`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Registered once per registry. Labels are bounded: model names come from the configuration."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.running = Gauge("covey_num_requests_running", "Requests that hold a permit", registry=registry)
        self.waiting = Gauge("covey_num_requests_waiting", "Requests that wait for a permit", registry=registry)
        self.programs = Gauge("covey_num_programs", "Programs held in memory", registry=registry)
        self.requests = Counter(
            "covey_requests_total", "Requests by how they ended", ["model", "code"], registry=registry
        )
        self.ttft_s = Histogram(
            "covey_time_to_first_token_seconds",
            "From arrival to the first token",
            ["model"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.itl_s = Histogram(
            "covey_inter_token_latency_seconds",
            "Between deltas of one choice",
            ["model"],
            buckets=_TOKEN_S,
            registry=registry,
        )
        self.e2e_s = Histogram(
            "covey_e2e_request_latency_seconds",
            "From arrival to the end",
            ["model"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.prompt_tokens = Counter("covey_prompt_tokens_total", "Prompt tokens", ["model"], registry=registry)
        self.generation_tokens = Counter(
            "covey_generation_tokens_total", "Generated tokens", ["model"], registry=registry
        )
        self.prefix_queries = Counter(
            "covey_prefix_cache_queries_total", "Prompt tokens looked up", ["model"], registry=registry
        )
        self.prefix_hits = Counter(
            "covey_prefix_cache_hits_total", "Prompt tokens that need not be computed", ["model"], registry=registry
        )
        self.answers = Counter(
            "covey_answer_cache_total", "Requests by what semcache did", ["outcome"], registry=registry
        )
        self.migrations = Counter(
            "covey_migrations_total", "Sequences taken over by another worker", ["reason"], registry=registry
        )
        self.break_even = Gauge(
            "covey_kv_break_even_tokens", "Tokens from which loading costs less than computing", registry=registry
        )
        self.pins = Counter("covey_pins_total", "Pins asked of workers by outcome", ["outcome"], registry=registry)
