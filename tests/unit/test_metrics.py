"""Metrics: bounded labels, and sums that agree with them."""

from __future__ import annotations

import errno

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tierd.metrics import ERRNO_LABELS, OTHER, Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry(), models_max=50, operations=["open", "read"])


def samples(metrics: Metrics, name: str) -> dict[str, float]:
    """What a scrape says of one metric, by the value of its only label."""
    text = generate_latest(metrics.registry).decode("utf-8")
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.parametrize("models_max", [0, 1, 50])
def test_models_have_at_most_so_many_labels(models_max: int) -> None:
    metrics = Metrics(CollectorRegistry(), models_max=models_max)
    for number in range(10_000):
        metrics.opened(b"models/%d" % number, load_begins=True)
        metrics.closed(b"models/%d" % number, 3)
    for name, each in (("tierd_opens_total", 1), ("tierd_loads_total", 1), ("tierd_read_bytes_total", 3)):
        found = samples(metrics, name)
        assert len(found) == models_max + 1
        assert found[OTHER] == (10_000 - models_max) * each
        assert sum(found.values()) == 10_000 * each
    assert metrics.totals()["opens"] == 10_000


def test_no_model_is_other(metrics: Metrics) -> None:
    metrics.opened(None, load_begins=False)
    metrics.closed(None, 5)
    assert samples(metrics, "tierd_opens_total") == {OTHER: 1}
    assert samples(metrics, "tierd_loads_total").get(OTHER, 0) == 0
    assert samples(metrics, "tierd_read_bytes_total") == {OTHER: 5}


def test_opens_of_models_are_hits_or_misses_of_the_node_tier(metrics: Metrics) -> None:
    metrics.opened(b"models/a", load_begins=True, from_node=True)
    metrics.opened(b"models/b", load_begins=True, from_node=True)
    metrics.opened(b"models/a", load_begins=False, from_node=False)
    metrics.opened(None, load_begins=False, from_node=True)
    metrics.opened(None, load_begins=False)
    assert samples(metrics, "tierd_node_tier_opens_total") == {"hit": 2, "miss": 1}


def test_counters_exist_before_their_first_event(metrics: Metrics) -> None:
    """A series that appears with its first increment hides that increment from rate(), and absent() alerts fire."""
    for name in ("tierd_opens_total", "tierd_loads_total", "tierd_read_bytes_total"):
        assert samples(metrics, name) == {OTHER: 0}, name
    assert samples(metrics, "tierd_node_tier_opens_total") == {"hit": 0, "miss": 0}
    assert set(samples(metrics, "tierd_dropped_total")) == {"journal_event", "index_write", "index_row"}


def test_names_of_models_are_escaped(metrics: Metrics) -> None:
    metrics.opened(b'models/\xff"\n\\', load_begins=True)
    metrics.opened("models/모델".encode(), load_begins=True)
    assert set(samples(metrics, "tierd_opens_total")) >= {'models/\\xff"\n\\', "models/모델"}


def test_every_errno_label_counts_its_errno() -> None:
    assert len(ERRNO_LABELS) > 20
    for number, name in ERRNO_LABELS.items():
        metrics = Metrics(CollectorRegistry())
        metrics.error(number)
        counted = {label for label, value in samples(metrics, "tierd_request_errors_total").items() if value}
        assert counted == {name}


@pytest.mark.parametrize("number", [0, -1, 99_999, errno.ENOTTY])
def test_other_errnos_are_other(metrics: Metrics, number: int) -> None:
    metrics.error(number)
    found = samples(metrics, "tierd_request_errors_total")
    assert found[OTHER] == 1
    assert set(found) == {*ERRNO_LABELS.values(), OTHER}


def test_totals_sum_over_labels(metrics: Metrics) -> None:
    metrics.opened(b"a", load_begins=True)
    metrics.opened(b"b", load_begins=False)
    metrics.closed(b"a", 7)
    metrics.closed(b"b", 8)
    metrics.error(errno.ENOENT)
    metrics.error(errno.EIO)
    metrics.written_bytes.inc(9)
    metrics.handler_failures.inc()
    metrics.event_dropped()
    metrics.events_lost(3)
    metrics.index_rows_pruned(5)
    metrics.index_rows_pruned(0)
    assert metrics.totals() == {
        "opens": 2,
        "loads": 1,
        "read_bytes": 15,
        "written_bytes": 9,
        "request_errors": 2,
        "handler_failures": 1,
        "dropped": 9,
    }


def test_depths_are_asked_for_at_each_scrape(metrics: Metrics) -> None:
    queue = [1, 2]
    metrics.watch_depth("journal", lambda: len(queue))
    assert samples(metrics, "tierd_depth") == {"journal": 2}
    queue.clear()
    assert samples(metrics, "tierd_depth") == {"journal": 0}


def test_request_times_have_a_series_for_each_operation(metrics: Metrics) -> None:
    metrics.latency["open"].observe(0.002)
    assert samples(metrics, "tierd_request_seconds_count") == {"open": 1, "read": 0}
