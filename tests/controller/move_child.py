"""A leader in a process of its own, which is killed (SIGKILL) at the effect with a given number."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.controller.fate import Fate
from tests.controller.kills import CASES
from tests.controller.moving import opened_site
from tests.servers import run


def main(root: str, dsn: str, model_id: str, case: str, last: str) -> None:
    """The arguments are those of the command line."""
    site = opened_site(Path(root), dsn, lease_reports=False)
    site.model_id = model_id
    fate = Fate(int(last), lambda effect: CASES[case].meddle(site, effect), really=True)

    async def work() -> None:
        async with site.leading(fate) as moves:
            await CASES[case].act(site, moves)

    run(work())


if __name__ == "__main__":
    main(*sys.argv[1:])
