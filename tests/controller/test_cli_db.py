"""`tierd db migrate` and `tierd db status`: what they print, how they fail, and what they do not show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tests.controller.house import REPOSITORY, environment, tierd
from tests.servers import PostgresServer, free_port
from tierd.controller.migrate import known

KNOWN = known()


def test_migrate_then_status(database: str) -> None:
    before = tierd("db", "status", TIERDCTL_POSTGRES=database)
    assert before.returncode == 1
    assert before.stdout.count("pending") == len(KNOWN)
    assert before.stderr == "tierd: the database lacks migration 0001_tables\nhint: run `tierd db migrate`\n"
    done = tierd("db", "migrate", TIERDCTL_POSTGRES=database)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"applied {migration}" for migration in KNOWN]
    after = tierd("db", "status", TIERDCTL_POSTGRES=database)
    assert (after.returncode, after.stderr) == (0, "")
    assert "pending" not in after.stdout
    assert all(str(migration) in after.stdout for migration in KNOWN)


def test_json(database: str, tmp_path: Path) -> None:
    config = tmp_path / "controller.yaml"
    config.write_text(f"postgres: {database}\n", encoding="utf-8")
    before = tierd("db", "status", "--json", "--config", str(config))
    assert before.returncode == 1
    pending = [{"version": migration.version, "name": migration.name} for migration in KNOWN]
    assert json.loads(before.stdout) == {"applied": [], "pending": pending}
    done = tierd("db", "migrate", "--json", TIERDCTL_CONFIG=str(config))
    assert json.loads(done.stdout) == {"applied": [str(migration) for migration in KNOWN]}
    again = tierd("db", "migrate", "--json", "--config", str(config))
    assert json.loads(again.stdout) == {"applied": []}
    told = json.loads(tierd("db", "status", "--json", "--config", str(config)).stdout)
    assert told["pending"] == []
    assert [(row["version"], row["name"], row["sha256"]) for row in told["applied"]] == [
        (migration.version, migration.name, migration.sha256) for migration in KNOWN
    ]
    age = datetime.now(UTC) - datetime.fromisoformat(told["applied"][0]["applied_at"])
    assert abs(age.total_seconds()) < 600


def test_the_flag_with_a_password_from_a_file(postgres: PostgresServer, database: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(postgres.password, encoding="utf-8")
    url = database.replace(f":{postgres.password}", "")
    done = tierd("db", "migrate", "--postgres", url, TIERDCTL_POSTGRES_PASSWORD_FILE=str(file))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_password_on_the_command_line_is_refused(postgres: PostgresServer, database: str) -> None:
    done = tierd("db", "migrate", "--postgres", database)
    assert done.returncode == 2
    assert done.stderr.startswith("tierd: --postgres holds a password, ")
    assert postgres.password not in done.stderr


def test_failures_are_one_line_and_a_hint() -> None:
    port = free_port()
    away = tierd("db", "migrate", TIERDCTL_POSTGRES=f"postgresql://ann:hunter2@127.0.0.1:{port}/books")
    assert away.returncode == 1
    said = f"tierd: cannot connect to database 127.0.0.1:{port}/books: Connection refused"
    assert away.stderr.splitlines()[0] == said
    nameless = tierd("db", "status")
    unknown = tierd("db", "status", TIERDCTL_POSTGRES_HOTS="hunter2")
    broken = tierd("db", "status", TIERDCTL_POSTGRES="postgresql://ann:1/hunter2@books")
    assert [done.returncode for done in (nameless, unknown, broken)] == [2, 2, 2]
    for done in (away, nameless, unknown, broken):
        first, second = done.stderr.splitlines()
        assert (first[:7], second[:6]) == ("tierd: ", "hint: ")
        assert done.stdout == ""
        assert "hunter2" not in done.stderr


def test_other_commands_and_the_daemon_do_without_the_controllers_libraries() -> None:
    """They would cost each of them memory and a part of its start."""
    code = (
        "import sys, tierd.cli.main, tierd.node.daemon;"
        "theirs = ('asyncpg', 'minio', 'tierd.controller.');"
        "named = ('tierd.controller.jobs', 'tierd.controller.jobs.names');"
        "print([name for name in sys.modules if name.startswith(theirs) and name not in named])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment({}))
    assert done.stdout == "[]\n"


def test_node_and_controller_never_import_each_other() -> None:
    for side, other in (("node", "tierd.controller"), ("controller", "tierd.node")):
        files = list((REPOSITORY / "tierd" / side).rglob("*.py"))
        assert files
        imports = re.compile(rf"^\s*(from|import) {re.escape(other)}\b", re.MULTILINE)
        assert [path.name for path in files if imports.search(path.read_text())] == []
