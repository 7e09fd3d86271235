"""Precedence of the sources, and refusal of what no field is named for in each of them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from common.config import FOR_TESTS, ServiceConfig, load_config, load_config_or_exit
from common.errors import InvalidArgument


class SampleConfig(ServiceConfig):
    """Configuration of a sample service."""

    service: ClassVar[str] = "sample"

    listen: str = Field("0.0.0.0:50051", description="Address to listen on.")
    model_dir: Path = Field(description="Directory of the checkpoint.")
    queue_limit: int = Field(8, ge=1, description="Requests that may wait.")
    timeout_s: float = Field(1.5, gt=0, description="Longest wait, in seconds.")
    eager: bool = Field(True, description="100% eager.")
    peers: tuple[str, ...] = Field((), description="Addresses of peers.")
    ports: tuple[int, ...] = Field((), description="Ports.")
    label: str | None = Field(None, description="Free text.")
    break_every: int = Field(0, description="Breaks.", json_schema_extra=FOR_TESTS)


def load(*argv: str, **environ: str) -> SampleConfig:
    return load_config(SampleConfig, ["--model-dir", "/m", *argv], environ)


def test_defaults_hold_where_nothing_is_given() -> None:
    config = load()
    assert (config.queue_limit, config.eager, config.peers) == (8, True, ())
    assert config.model_dir == Path("/m")


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "sample.toml"
    file.write_text('queue_limit = 1\ntimeout_s = 2.0\nlisten = "file"\npeers = ["a", "b"]\n')
    config = load("--config", str(file), "--listen", "flag", BATON_SAMPLE_QUEUE_LIMIT="3", BATON_SAMPLE_LISTEN="e")
    assert (config.queue_limit, config.timeout_s, config.listen) == (3, 2.0, "flag")
    assert config.peers == ("a", "b")


def test_the_file_can_be_named_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "sample.toml"
    file.write_text("queue_limit = 5\n")
    assert load(BATON_SAMPLE_CONFIG=str(file)).queue_limit == 5


def test_lists_are_comma_separated_or_repeated() -> None:
    assert load("--peers", "a, b", "--peers", "c").peers == ("a", "b", "c")
    assert load(BATON_SAMPLE_PORTS="1,2").ports == (1, 2)


def test_booleans_have_a_negation() -> None:
    assert load("--no-eager").eager is False
    assert load(BATON_SAMPLE_EAGER="false").eager is False
    assert load("--eager", BATON_SAMPLE_EAGER="0").eager is True


def test_other_services_variables_are_ignored() -> None:
    assert load(BATON_OTHER_QUEUE="x", PATH="y").queue_limit == 8


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["--queue-limits", "3"], {}, "--queue-limits"),
        (["--queue", "3"], {}, "--queue"),
        ([], {"BATON_SAMPLE_QUEUE": "3"}, "BATON_SAMPLE_QUEUE"),
        ([], {"BATON_SAMPLE_QUEUE_LIMIT": "many"}, "BATON_SAMPLE_QUEUE_LIMIT = 'many'"),
        (["--queue-limit", "0"], {}, "--queue-limit = '0'"),
        (["--timeout-s", "nan"], {}, "--timeout-s"),
        (["--config", "/does/not/exist.toml"], {}, "/does/not/exist.toml"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(argv: list[str], environ: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(*argv, **environ)
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["queue_limi = 3\n", "[queue]\nlimit = 3\n", "queue_limit = = 3\n"])
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sample.toml"
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=r"queue|TOML"):
        load("--config", str(file))


def test_a_missing_required_field_names_its_flag() -> None:
    with pytest.raises(InvalidArgument, match="--model-dir"):
        load_config(SampleConfig, [], {})


def test_exit_status_is_two_and_the_message_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config_or_exit(SampleConfig, ["--nope"], {})
    assert caught.value.code == 2
    assert "--nope" in capsys.readouterr().err


def test_what_is_for_tests_is_taken_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("--break-every", "3").break_every == 3
    with pytest.raises(SystemExit):
        load("--help")
    assert "break" not in capsys.readouterr().out


def test_help_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(SampleConfig, ["--help"], {})
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in SampleConfig.model_fields.items():
        assert ((field.description or "missing") in shown) is (name != "break_every")
    assert "--no-eager" in shown
    assert "default: 1.5" in shown
    assert "required" in shown
