"""What uploads and downloads of one S3 store share: clients, retries, bandwidth, workers. Knows no checksums.

Contract: any thread. Connections are as many as workers; whoever finds all of them busy waits for one. What a
worker does never waits for another worker.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar
from urllib.parse import urlsplit

import urllib3

from tierd.objects.attempts import Attempts
from tierd.objects.endpoint import Endpoint, Limits
from tierd.objects.pace import Deadline, Throttle
from tierd.objects.store import ObjectStoreUnavailable, Place
from tierd.objects.wire import BLOCK_BYTES, Pace, Wire

Answer = TypeVar("Answer")
Work = TypeVar("Work")
_FINISH_S: Final = 300.0
"""How long a server may take to put the parts of an upload together before it answers."""


class Transport:
    """See the module."""

    def __init__(self, endpoint: Endpoint, limits: Limits) -> None:
        self.endpoint = endpoint.url
        self.limits = limits
        self._stopping = threading.Event()
        self._throttle = Throttle(limits.bytes_per_s, self._stopping)
        self._attempts = Attempts(limits.schedule, self._stopping)
        self._pools = [_pool(endpoint, limits, limits.stall_s), _pool(endpoint, limits, _FINISH_S)]
        self.wire, self.patient_wire = (_wire(endpoint, pool) for pool in self._pools)
        self._workers = ThreadPoolExecutor(limits.parallel, thread_name_prefix="objects")

    @property
    def repeated(self) -> int:
        """Requests that were made again after a fault."""
        return self._attempts.repeated

    def place(self, bucket: str, key: str = "") -> Place:
        """For messages."""
        return Place(self.endpoint, bucket, key)

    def call(self, place: Place, request: Callable[[], Answer], position: Callable[[], int] = lambda: 0) -> Answer:
        """Make a request until it succeeds; see Attempts. Raises ObjectError."""
        return self._attempts.run(place, request, position)

    def pace(self, size: int) -> Pace:
        """For one try that moves `size` bytes: keeps to the bandwidth, and ends it when it stalls."""
        deadline = Deadline(self.limits.stall_s, size)

        def moved(some: int) -> None:
            deadline.extend(self._throttle.wait(some))
            deadline.check()

        return moved

    def submit(self, place: Place, work: Callable[[Work], Answer], item: Work) -> Future[Answer]:
        """Do it in a worker. Raises ObjectStoreUnavailable once the store is closed."""
        try:
            return self._workers.submit(work, item)
        except RuntimeError:
            raise ObjectStoreUnavailable(place, "tierd stops using it", hint="start it again") from None

    def close(self) -> None:
        """Requests that run fail soon, others from now on at once."""
        self._stopping.set()
        self._workers.shutdown()
        for pool in self._pools:
            pool.clear()


def _pool(endpoint: Endpoint, limits: Limits, stall_s: float) -> urllib3.PoolManager:
    # The connect timeout is also how long a block may take to be sent. Retries are ours, and redirects are errors.
    return urllib3.PoolManager(
        num_pools=1,
        maxsize=limits.parallel,
        block=True,
        timeout=urllib3.Timeout(connect=limits.stall_s, read=stall_s),
        retries=False,
        blocksize=BLOCK_BYTES,
        cert_reqs="CERT_REQUIRED",
        ca_certs=endpoint.ca_file,  # without one, those of the system
    )


def _wire(endpoint: Endpoint, pool: urllib3.PoolManager) -> Wire:
    url = urlsplit(endpoint.url)
    wire = Wire(
        url.netloc,
        secure=url.scheme == "https",
        region=endpoint.region,
        http_client=pool,
        access_key=endpoint.keys.access_key,
        secret_key=endpoint.keys.secret_key,
        session_token=endpoint.keys.session_token,
    )
    if endpoint.path_style:
        wire.disable_virtual_style_endpoint()  # type: ignore[no-untyped-call]
    return wire
