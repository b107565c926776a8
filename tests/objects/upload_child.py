"""Uploads a file, perhaps until it is killed, hashes the object, and prints its peak memory in bytes.

`python -m tests.objects.upload_child URL KEY FILE JOURNAL BYTES_PER_S`
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from bench import s3
from tests.objects.house import BUCKET, PATIENT
from tests.objects.servers import s3_store


def main(url: str, key: str, file: str, journal: str, bytes_per_s: str) -> None:
    """Keys come by the environment, as everywhere."""
    server = s3.Server(url, os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    store = s3_store(server, PATIENT._replace(bytes_per_s=int(bytes_per_s), parallel=2))
    store.put_file(BUCKET, key, Path(file), Path(file).stat().st_size, None, Path(journal))
    store.hash(BUCKET, key)
    store.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
