"""Settings: which layer wins, what is refused, and how a refusal reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tierd.cli.main import app
from tierd.config import MountSettings, host_port, load, relative_root, size_bytes
from tierd.errors import UsageError

PATHS = {"source": "/source", "mountpoint": "/mnt"}


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "tierd.yaml"


def refusal(flags: dict[str, Any], environ: dict[str, str] | None = None, config: Path | None = None) -> UsageError:
    """The one error that loading these layers gives."""
    with pytest.raises(UsageError) as caught:
        load({**PATHS, **flags}, environ or {}, config)
    error = caught.value
    assert "\n" not in f"{error}{error.hint}", "one line each"
    assert error.hint
    assert error.exit_code == 2
    return error


def test_flags_over_environment_over_file(yaml_file: Path) -> None:
    yaml_file.write_text("attr_timeout: 3\nentry_timeout: 3\nmetrics_models: 3\nload_idle_gap: 3\n", encoding="utf-8")
    environ = {"TIERD_ATTR_TIMEOUT": "2", "TIERD_ENTRY_TIMEOUT": "2", "TIERD_METRICS": "[::1]:0", "PATH": "/bin"}
    settings = load({**PATHS, "attr_timeout": 1.5, "entry_timeout": None}, environ, yaml_file)
    assert settings.attr_timeout == 1.5
    assert settings.entry_timeout == 2
    assert settings.metrics_models == settings.load_idle_gap == 3
    assert settings.metrics == "[::1]:0"
    assert settings.journal_capacity == MountSettings.model_fields["journal_capacity"].default


def test_a_wrong_value_that_is_overridden_does_no_harm(yaml_file: Path) -> None:
    yaml_file.write_text("attr_timeout: soon\n", encoding="utf-8")
    assert load({**PATHS, "attr_timeout": 1.0}, {}, yaml_file).attr_timeout == 1


def test_the_variable_that_names_the_file_is_no_setting() -> None:
    assert load(PATHS, {"TIERD_CONFIG": "/etc/tierd.yaml"}).source == Path("/source")


@pytest.mark.parametrize(
    ("key", "near"), [("attr_timout", "attr_timeout"), ("modelsroot", "models_root"), ("log-level", "log_level")]
)
def test_unknown_key_names_its_layer_and_near_names(key: str, near: str, yaml_file: Path) -> None:
    yaml_file.write_text(f"{key}: 1\n", encoding="utf-8")
    refused = (
        (refusal({key: "1"}), "--" + key.replace("_", "-")),
        (refusal({}, {f"TIERD_{key.upper()}": "1"}), f"TIERD_{key.upper()}"),
        (refusal({}, {}, yaml_file), f"{yaml_file}: {key}"),
    )
    for error, where in refused:
        assert str(error) == f"{where}: unknown setting"
        assert near in error.hint


def test_unknown_key_like_nothing_points_to_the_list() -> None:
    error = refusal({}, {"TIERD_FOO": "1"})
    assert str(error) == "TIERD_FOO: unknown setting"
    assert error.hint == "`tierd mount --help` lists all settings"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attr_timeout", "soon"),
        ("attr_timeout", "-1"),
        ("attr_timeout", "nan"),
        ("attr_timeout", "inf"),
        ("entry_timeout", "1e9"),
        ("load_idle_gap", "0"),
        ("metrics_models", "many"),
        ("metrics_models", "1001"),
        ("metrics_models", "1.5"),
        ("read_ahead_kib", "3"),
        ("read_ahead_kib", "1 MiB"),
        ("journal_capacity", "15"),
        ("history_rows", "-1"),
        ("max_files_known", "999"),
        ("allow_other", "perhaps"),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("metrics", "nonsense"),
        ("models_root", "/models"),
        ("outputs_root", "../outputs"),
    ],
)
def test_ill_typed_value_names_its_layer(key: str, value: str, yaml_file: Path) -> None:
    yaml_file.write_text(f"{key}: {value!r}\n", encoding="utf-8")
    refused = (
        (refusal({key: value}), "--" + key.replace("_", "-")),
        (refusal({}, {f"TIERD_{key.upper()}": value}), f"TIERD_{key.upper()}"),
        (refusal({}, {}, yaml_file), f"{yaml_file}: {key}"),
    )
    for error, where in refused:
        assert str(error).startswith(f"{where}: ")
        assert value in str(error), "it says what it got"


@pytest.mark.parametrize("yaml", ["metrics_models: yes", "read_ahead_kib: true", "history_rows: on"])
def test_a_truth_value_is_no_number(yaml: str, yaml_file: Path) -> None:
    yaml_file.write_text(yaml, encoding="utf-8")
    refusal({}, {}, yaml_file)


@pytest.mark.parametrize("key", ["state_dir", "log_file"])
def test_an_empty_path_is_not_the_working_directory(key: str) -> None:
    """`TIERD_STATE_DIR=` in a unit file or manifest must not put the state into whatever directory is current."""
    error = refusal({}, {f"TIERD_{key.upper()}": ""})
    assert str(error).startswith(f"TIERD_{key.upper()}: ")


@pytest.mark.parametrize("missing", ["source", "mountpoint"])
def test_missing_path(missing: str) -> None:
    with pytest.raises(UsageError, match=f"^{missing.upper()} is missing$"):
        load({key: value for key, value in PATHS.items() if key != missing})


def test_lists_in_every_layer(yaml_file: Path) -> None:
    wanted = ("models", "more models", "a/b")
    yaml_file.write_text("models_root: [models, more models, a/b]\n", encoding="utf-8")
    for settings in (
        load(PATHS, {"TIERD_MODELS_ROOT": "models, more models ,,a/b"}),
        load(PATHS, {}, yaml_file),
        load({**PATHS, "models_root": list(wanted)}),
    ):
        assert settings.models_root == wanted
    yaml_file.write_text("models_root: models,more models,a/b\n", encoding="utf-8")
    assert load(PATHS, {}, yaml_file).models_root == wanted


def test_roots_as_bytes_keep_what_is_not_utf8() -> None:
    settings = load(PATHS, {"TIERD_MODELS_ROOT": "mod\udcffels,모델"})
    assert settings.models_roots_bytes == (b"mod\xffels", "모델".encode())


@pytest.mark.parametrize(
    ("root", "plain"),
    [
        ("models", "models"),
        ("models/", "models"),
        ("./models//sub/.", "models/sub"),
        (".", ""),
        ("", ""),
        ("..models/a..b", "..models/a..b"),
    ],
)
def test_roots_in_their_plain_form(root: str, plain: str) -> None:
    assert relative_root(root) == plain


@pytest.mark.parametrize("root", ["/models", "/", "..", "../models", "models/../..", "models/..", "mo\0dels"])
def test_roots_stay_inside_the_source(root: str) -> None:
    with pytest.raises(ValueError, match=r"must (be relative to|not climb out of) the source"):
        relative_root(root)
    assert str(refusal({"models_root": [root]})).startswith("--models-root: must ")
    assert str(refusal({"outputs_root": root})).startswith("--outputs-root: must ")


@pytest.mark.parametrize(
    ("address", "pair"),
    [
        ("127.0.0.1:9568", ("127.0.0.1", 9568)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("node-1.example:65535", ("node-1.example", 65_535)),
        ("[::1]:9568", ("::1", 9568)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)
def test_addresses(address: str, pair: tuple[str, int]) -> None:
    assert host_port(address) == pair
    assert load({**PATHS, "metrics": address}).metrics == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "9568",
        ":9568",
        "localhost",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:65536",
        "a:٣",
        "a:1 ",
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        host_port(address)


@pytest.mark.parametrize("address", ["::1:9568", "::1", "[::1:80", "::1]:80", "[]:80", "[[::1]]:80"])
def test_ipv6_wants_its_brackets(address: str) -> None:
    """Without them it cannot be told where the address ends: `::1:9568` is an address itself."""
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        host_port(address)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_empty_file_has_no_settings(text: str, yaml_file: Path) -> None:
    yaml_file.write_text(text, encoding="utf-8")
    assert load(PATHS, {}, yaml_file) == load(PATHS)


@pytest.mark.parametrize("text", ["- models\n", "models\n", "5\n"])
def test_file_that_holds_no_settings(text: str, yaml_file: Path) -> None:
    yaml_file.write_text(text, encoding="utf-8")
    assert str(refusal({}, {}, yaml_file)).startswith(f"{yaml_file} must hold settings")


@pytest.mark.parametrize(
    "data", [b"a: [1, 2\n", b"a: b: c\n", b"\xff\xfe", b"a: \x00", b"!!python/name:os.system\n", b"\t"]
)
def test_file_that_is_no_yaml(data: bytes, yaml_file: Path) -> None:
    yaml_file.write_bytes(data)
    assert str(refusal({}, {}, yaml_file)).startswith(f"{yaml_file} is not valid YAML: ")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert str(refusal({}, {}, missing)) == f"cannot read configuration {missing}: No such file or directory"
    assert str(refusal({}, {}, tmp_path)) == f"cannot read configuration {tmp_path}: Is a directory"


def test_key_that_is_no_text(yaml_file: Path) -> None:
    yaml_file.write_text("5: 6\n", encoding="utf-8")
    assert str(refusal({}, {}, yaml_file)) == f"{yaml_file}: 5: unknown setting"


def test_list_with_a_wrong_item(yaml_file: Path) -> None:
    yaml_file.write_text("models_root: [models, 5]\n", encoding="utf-8")
    error = refusal({}, {}, yaml_file)
    assert str(error).startswith(f"{yaml_file}: models_root: ")
    assert "got 5" in str(error)


def test_control_characters_in_a_value_stay_on_one_line(yaml_file: Path) -> None:
    yaml_file.write_text('log_level: "lo\\nud\\e[31m"\n', encoding="utf-8")
    assert str(refusal({}, {}, yaml_file)).isprintable()


# --- the help text and the settings are the same ---


def mount_options() -> dict[str, Any]:
    """The options of `tierd mount` that are settings, by name."""
    command = typer.main.get_command(app).commands["mount"]  # type: ignore[attr-defined]
    own = {"background_", "config", "ready_fd", "template_fd", "attach", "source", "mountpoint", "help"}
    return {option.name: option for option in command.params if option.name not in own}


def test_every_setting_has_its_option() -> None:
    assert mount_options().keys() == MountSettings.model_fields.keys() - PATHS.keys()


TOLD_IN_WORDS = {
    *("state_dir", "log_file", "allow_other", "cache_dir", "free_space_target"),
    *("redis", "redis_password_file", "redis_ca", "node_name", "objects"),
}
SIZES = {"cache_size", "fill_bandwidth", "recall_bytes_per_hour"}
SWITCHES = {"yes": True, "no": False}
"""Their default is decided at run time, and None in the settings."""


@pytest.mark.parametrize("name", sorted(MountSettings.model_fields.keys() - PATHS.keys()))
def test_help_tells_the_default(name: str) -> None:
    told = re.search(r"\[dim\]Default: (.+?)\[/\]$", mount_options()[name].help)
    assert told, "its help ends with its default"
    default = getattr(load(PATHS), name)
    if name in TOLD_IN_WORDS:
        assert default is None
    elif isinstance(default, tuple):
        assert tuple(told[1].split(", ")) == default
    elif name in SIZES:
        assert size_bytes(told[1]) == default
    elif isinstance(default, bool):
        assert SWITCHES[told[1]] == default
    else:
        assert type(default)(told[1]) == default
