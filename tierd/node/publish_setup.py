"""Puts publishing together for the daemon, if its settings name a Redis. Loads the client, which others need not."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, cast

from prometheus_client import CollectorRegistry
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tierd import __version__
from tierd.config import MountSettings, read_secret
from tierd.metrics import PublishMetrics
from tierd.node.catalog import files_of
from tierd.node.cold_bytes import ColdBytes
from tierd.node.forgetting import Forgetting
from tierd.node.handles import FileHandle
from tierd.node.index import Index
from tierd.node.inodes import Node
from tierd.node.listings import Listings
from tierd.node.open_models import OpenModels
from tierd.node.outbox import Outbox
from tierd.node.overlay import Overlay
from tierd.node.publish import Client, Exchange, Publisher
from tierd.node.store import Store
from tierd.node.wishes import Wishes
from tierd.redis_options import address, redis_options
from tierd.stubs import Origin
from tierd.units import model_of

_SIZE_AGE_SECONDS: Final = 300.0
"""How old a model's size may be: the controller takes it for models only that it does not know."""

GAUGES: Final[dict[str, tuple[str, Callable[[Publisher], float]]]] = {
    "publish_backlog_batches": ("Batches that the controller has not acknowledged.", lambda p: p.exchange.backlog),
    "publish_acknowledged_batches": ("Batches acknowledged since start.", lambda p: p.exchange.acknowledged),
    "publish_resent_batches": ("Batches sent again since start.", lambda p: p.exchange.resent),
    "promote_wishes_waiting": ("Cold models to be asked for.", lambda p: len(p.exchange.wishes)),
    "promote_wishes_sent": ("Cold models asked for since start.", lambda p: p.exchange.wishes.sent_count),
    "promote_wishes_dropped": ("Cold models that no room was left for.", lambda p: p.exchange.wishes.dropped),
    "publish_dropped_outputs": (
        "Outputs of which the controller hears only by its scan: too many waited.",
        lambda p: p.exchange.outbox.outputs_dropped,
    ),
    "publish_dropped_models": ("Models that no catalogue can name.", lambda p: p.exchange.outbox.dropped),
}
"""What is exported as `tierd_NAME` at each scrape."""


def publisher_of(
    settings: MountSettings,
    index: Index,
    registry: CollectorRegistry,
    overlay: Callable[[], Overlay],
    is_model_dir: Callable[[bytes], bool],
    store: Store | None,
    cold: ColdBytes | None,
) -> Publisher:
    """The publisher of a daemon. Connects to nothing yet; `overlay` is asked once it runs. `store`, `cold`: what the
    node may have of outputs that are deleted."""
    assert settings.redis is not None, "nobody is told"
    url = settings.redis.get_secret_value()

    def model_of_path(path: bytes) -> bytes | None:
        return model_of(path, settings.models_roots_bytes, is_model_dir)

    def files() -> Mapping[int, FileHandle]:
        overlay().take_events()
        return overlay().files

    def path_of(node: Node) -> bytes:
        return overlay().inodes.path(node)

    def cold_open() -> list[Origin]:
        handles = list(overlay().files.values())
        return [handle.origin for handle in handles if handle.origin is not None]

    metrics = PublishMetrics(registry)
    publisher = Publisher(
        Exchange(
            Outbox(index),
            lambda: _connect(settings, url),
            node_id(settings),
            version=__version__,
            wishes=Wishes(model_of_path),
            forget=Forgetting(index, store, cold, cold_open).round,
        ),
        metrics,
        address=address(url),
        interval_s=settings.publish_interval,
        open_models=OpenModels(files, path_of, model_of_path),
        size_of=partial(_size_of, Listings(lambda model: files_of(overlay().source, model, model_of_path))),
    )
    for name, (text, value) in GAUGES.items():
        metrics.watch(name, text, partial(value, publisher))
    return publisher


def node_id(settings: MountSettings) -> str:
    """What the controller calls the daemon of a mount."""
    return settings.node_name or socket.gethostname()


def _size_of(listings: Listings, model: bytes) -> int | None:
    try:
        return sum(file.identity.size for file in listings.recent(model, _SIZE_AGE_SECONDS))
    except OSError:
        return None  # the controller does without


def _connect(settings: MountSettings, url: str) -> Client:
    """A client that tries each thing once. The password is read each time: it may have been changed.

    Raises UsageError if it cannot be read.
    """
    file = settings.redis_password_file
    password = read_secret(file).get_secret_value() if file is not None else None
    options = redis_options(url, password, settings.redis_ca)
    return cast(Client, Redis(**options, retry=Retry(NoBackoff(), 0)))
