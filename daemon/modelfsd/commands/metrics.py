"""The page `/metrics`: a node's counters and histograms in the text format of Prometheus.

A pure translation of what `Measures` has joined. Names end in their unit, counters in `_total`;
histograms have one bucket for each power of two from 1 µs to 128 s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from modelfs import __version__
from modelfsd.stages import Latencies

Counters = Mapping[str, Any]
Histograms = Mapping[str, Latencies]


def text(counters: Counters, requests: Histograms, stages: Histograms) -> str:
    """The whole page."""
    registry = CollectorRegistry()
    registry.register(_Snapshot(counters, requests, stages))
    ProcessCollector(registry=registry)
    return generate_latest(registry).decode("utf-8")


class _Snapshot(Collector):
    """Gives out what it was made with."""

    def __init__(self, counters: Counters, requests: Histograms, stages: Histograms) -> None:
        self._counters, self._requests, self._stages = counters, requests, stages

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        yield _gauge("modelfs_info", "This daemon.", {__version__: 1}, "version")
        yield _histogram("modelfs_request_seconds", "Kernel requests.", "request", self._requests)
        yield _histogram("modelfs_stage_seconds", "Stages of requests.", "stage", self._stages)
        yield from _reads_and_writes(self._counters)
        yield from _peers(self._counters["peers"], self._counters["served"])
        yield from _state(self._counters)


def _reads_and_writes(counters: Counters) -> Iterator[Metric]:
    chunks = counters["chunks"]
    sources = {"local": chunks["local_bytes"], "remote": chunks["remote_bytes"]}
    yield _counter("modelfs_read_bytes", "Bytes of chunks read.", sources, "source")
    failed = {"failover": chunks["failovers"], "corrupt": chunks["corrupt"]}
    yield _counter("modelfs_read_failures", "Copies that could not serve.", failed, "reason")
    yield _counter("modelfs_pushed_bytes", "To the kernel.", counters["pushes"].get("bytes", 0))
    sent = {"sent": counters["sent_bytes"], "spared": counters["spared_bytes"]}
    yield _counter("modelfs_replication_bytes", "For peers; spared: they had it.", sent, "what")
    yield _counter("modelfs_changes", "Changes of the namespace.", counters["changes"])
    about = "etcd transactions that made the changes."
    yield _counter("modelfs_transactions", about, counters["transactions"])


def _peers(peers: Mapping[str, Mapping[str, Any]], served: Mapping[str, Any]) -> Iterator[Metric]:
    def of_each(field: str) -> dict[str, float]:
        return {name: peer[field] for name, peer in peers.items()}

    yield _counter("modelfs_peer_received_bytes", "As a client.", of_each("bytes_in"), "peer")
    yield _counter("modelfs_peer_sent_bytes", "As a client.", of_each("bytes_out"), "peer")
    about = "How often the peer did not answer."
    yield _counter("modelfs_peer_failures", about, of_each("failures"), "peer")
    yield _gauge("modelfs_peer_inflight", "Requests under way.", of_each("inflight"), "peer")
    latency = of_each("latency_seconds")
    yield _gauge("modelfs_peer_latency_seconds", "Moving average of fetches.", latency, "peer")
    yield _counter("modelfs_served_received_bytes", "As a server.", served["bytes_in"])
    yield _counter("modelfs_served_sent_bytes", "As a server.", served["bytes_out"])
    yield _counter("modelfs_served_requests", "Of peers.", served["requests"], "request")
    yield _gauge("modelfs_served_connections", "Of peers.", served["connections"])


def _state(counters: Counters) -> Iterator[Metric]:
    store = counters["store"]
    held = {"owned": store["owned_bytes"], "cached": store["cached_bytes"]}
    yield _gauge("modelfs_store_bytes", "Chunk files on this node's disk.", held, "holding")
    yield _gauge("modelfs_store_free_bytes", "Free on that disk.", store["free_bytes"])
    yield _gauge("modelfs_buffered_bytes", "Chunks in memory.", counters["buffered_bytes"])
    yield _gauge("modelfs_open_handles", "Open files.", counters["handles"])
    yield _gauge("modelfs_kernel_inodes", "Known to the kernel.", counters["kernel_inodes"])
    yield _gauge("modelfs_files", "In the cluster.", counters["files"])
    yield _gauge("modelfs_file_bytes", "In the cluster.", counters["bytes"])
    yield _gauge("modelfs_nodes_up", "Of the cluster.", counters["nodes_up"])
    for name, value in counters["upkeep"].items():
        yield _gauge(f"modelfs_upkeep_{name}", "As in `modelfs status`.", value)
    for name, value in counters["scrub"].items():
        yield _gauge(f"modelfs_scrub_{name}", "As in `modelfs status`.", value)


Value = float | Mapping[str, float]  # one number, or one for each value of the label


def _counter(name: str, about: str, value: Value, label: str = "") -> Metric:
    family = CounterMetricFamily(name, about, labels=[label] if label else None)
    _fill(family, value)
    return family


def _gauge(name: str, about: str, value: Value, label: str = "") -> Metric:
    family = GaugeMetricFamily(name, about, labels=[label] if label else None)
    _fill(family, value)
    return family


def _fill(family: CounterMetricFamily | GaugeMetricFamily, value: Value) -> None:
    if isinstance(value, Mapping):
        for of, number in value.items():
            family.add_metric([of], number)
    else:
        family.add_metric([], value)


def _histogram(name: str, about: str, label: str, histograms: Histograms) -> Metric:
    family = HistogramMetricFamily(name, about, labels=[label])
    for value, found in histograms.items():
        buckets = [(f"{bound:.9g}", float(count)) for bound, count in found.octaves()]
        buckets[-1] = ("+Inf", buckets[-1][1])  # it takes whatever lasted longer, too
        family.add_metric([value], buckets, found.seconds)
    return family
