"""Every command explains itself."""

from __future__ import annotations

import re

import pytest
import typer.main

from tests.cli.house import Done, House
from tierd import __version__
from tierd.cli.main import app

GROUP = typer.main.get_command(app)
COMMANDS = dict(GROUP.commands)  # type: ignore[attr-defined]
EVERY = COMMANDS | {
    f"{group} {name}": command
    for group, of in COMMANDS.items()
    for name, command in getattr(of, "commands", {}).items()
}
"""Those of groups, such as `db migrate`, too."""


def words_of(text: str) -> str:
    """Help without frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("name", sorted(EVERY))
def test_help_mentions_every_option(name: str, house: House) -> None:
    done = house.tierd(*name.split(), "-h")
    assert (done.code, done.err) == (0, "")
    text = words_of(done.out)
    for parameter in EVERY[name].params:
        if getattr(parameter, "hidden", False):
            assert not any(option in text for option in parameter.opts)
            continue
        assert parameter.help, f"{parameter.name} is explained"
        shown = parameter.opts if parameter.param_type_name == "option" else [parameter.name]
        assert any(option in text or option.upper() in text for option in shown), parameter.name
    assert EVERY[name].help.split("\n")[0].split("MOUNTPOINT")[0].strip()[:40] in text
    assert "python -m" not in text, "it is called tierd, however it was started"


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2)])
def test_help_lists_every_command(words: list[str], code: int, house: House) -> None:
    done = house.tierd(*words)
    assert done.code == code
    text = words_of(done.out + done.err)
    assert all(f" {command} " in text for command in COMMANDS)
    assert "TIERD_NAME" in text
    assert "--config" in text


def test_version(house: House) -> None:
    assert house.python("--version") == Done(0, f"tierd {__version__}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(house: House, shell: str) -> None:
    """The script completes `tierd`, and names a variable that a shell can set."""
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    run = house.python if shell == "bash" else house.tierd
    done = run("--show-completion", shell, env=environment)
    assert (done.code, done.err) == (0, "")
    assert "_TIERD_COMPLETE=" in done.out
    assert "tierd" in done.out
