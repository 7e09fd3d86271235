"""Typed configuration of one service, assembled from defaults, a TOML file, the environment, and flags.

Later sources win. Whatever no field is named for is refused, in each of them, with a message that says where
it stands. Pure: the caller passes arguments and environment in; only the file is read here. Knows no service.
"""

from __future__ import annotations

import argparse
import enum
import re
import sys
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from common.errors import InvalidArgument

# For `json_schema_extra` of a field that is for tests: it is taken like any other, and `--help` does not show it.
FOR_TESTS: Final[dict[str, JsonValue]] = {"for_tests": True}
_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:\[\]]+):([0-9]{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[IPv6]:port`. Raises `ValueError` if it is neither."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[2]) > 65535:
        raise ValueError("expected host:port, with a port of at most 65535")
    return match[1].strip("[]"), int(match[2])


def _check_address(address: str) -> str:
    split_address(address)
    return address


Address = Annotated[str, AfterValidator(_check_address)]
AddressOrNone = Annotated[str, AfterValidator(lambda address: address and _check_address(address))]  # none: empty


class ServiceConfig(BaseModel):
    """Base of every service's configuration. Fields are frozen and described; `service` names the service.

    Fields are strings, numbers, booleans, paths, enumerations, literals, or tuples of these; the description
    of each says what it is and in which unit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    service: ClassVar[str] = ""


_Config = TypeVar("_Config", bound=ServiceConfig)


def load_config(config_class: type[_Config], argv: Sequence[str], environ: Mapping[str, str]) -> _Config:
    """The configuration that file, environment and flags (`argv` without the program's name) give together.

    Raises `InvalidArgument` naming the setting and where it came from. `--help` prints and raises SystemExit.
    """
    flags = _parse_flags(config_class, argv)
    env_values = _read_environment(config_class, environ)
    config_file = flags.pop("config", None) or env_values.pop("config", None)
    file_values = _read_file(config_class, Path(str(config_file))) if config_file else {}
    env_values.pop("config", None)
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for layer, describe in (
        (file_values, lambda name: f"{name} in {config_file}"),
        (env_values, lambda name: _env_name(config_class, name)),
        (flags, _flag_name),
    ):
        for name, value in layer.items():
            values[name] = _split(config_class.model_fields[name], value)
            sources[name] = describe(name)
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise _invalid_setting(error, sources) from error


def load_config_or_exit(config_class: type[_Config], argv: Sequence[str], environ: Mapping[str, str]) -> _Config:
    """`load_config` for a `__main__`: a wrong setting is printed, and the process exits with status 2."""
    try:
        return load_config(config_class, argv, environ)
    except InvalidArgument as error:
        sys.stderr.write(f"baton {config_class.service}: {error}\n")
        raise SystemExit(2) from error


def _parse_flags(config_class: type[ServiceConfig], argv: Sequence[str]) -> dict[str, object]:
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{config_class.service}",
        description=(config_class.__doc__ or "").strip(),
        epilog=f"Every field may also be given as {_env_name(config_class, 'FIELD')} or in the file.",
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of fields, as in: field_name = value")
    for name, field in config_class.model_fields.items():
        _add_flag(parser, name, field)
    try:
        parsed, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise InvalidArgument(error.argument_name or "flag", None, error.message) from error
    if unknown:
        raise InvalidArgument("flag", unknown[0], "not a flag of this service; see --help")
    return vars(parsed)


def _add_flag(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    default = "required" if field.is_required() else f"default: {_shown_default(field)}"
    text = f"{field.description or ''} ({default})".replace("%", "%%")
    if isinstance(field.json_schema_extra, dict) and "for_tests" in field.json_schema_extra:
        text = argparse.SUPPRESS
    if _is_bool(field):
        parser.add_argument(_flag_name(name), dest=name, action=argparse.BooleanOptionalAction, help=text)
    elif _is_list(field):
        parser.add_argument(
            _flag_name(name),
            dest=name,
            action="append",
            metavar="A,B",
            help=f"{text} Comma-separated or repeated.",
        )
    else:
        parser.add_argument(_flag_name(name), dest=name, metavar=_metavar(field), help=text)


def _read_environment(config_class: type[ServiceConfig], environ: Mapping[str, str]) -> dict[str, object]:
    prefix = _env_name(config_class, "")
    known = {_env_name(config_class, name): name for name in (*config_class.model_fields, "config")}
    values: dict[str, object] = {}
    for variable, value in environ.items():
        if not variable.startswith(prefix):
            continue
        if variable not in known:
            hint = "names no setting (if Kubernetes made it: set enableServiceLinks: false on the pod)"
            raise InvalidArgument(variable, value, hint)
        values[known[variable]] = value
    return values


def _read_file(config_class: type[ServiceConfig], path: Path) -> dict[str, object]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument("config", str(path), f"cannot be read as TOML: {error}") from error
    for name in values:
        if name not in config_class.model_fields:
            raise InvalidArgument(f"{name} in {path}", values[name], "names no setting")
    return values


def _split(field: FieldInfo, value: object) -> object:
    """Comma-separated text, or a list of such, as a tuple; everything else as it is."""
    if not _is_list(field):
        return value
    items = value if isinstance(value, list) else [value]
    parts: list[object] = []
    for item in items:
        parts += [part.strip() for part in item.split(",") if part.strip()] if isinstance(item, str) else [item]
    return tuple(parts)


def _invalid_setting(error: ValidationError, sources: Mapping[str, str]) -> InvalidArgument:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        return InvalidArgument(name, None, f"is required: set {_flag_name(name)}")
    return InvalidArgument(
        sources.get(name, name or "settings"), first["input"], first["msg"].removeprefix("Value error, ")
    )


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _env_name(config_class: type[ServiceConfig], name: str) -> str:
    return f"BATON_{config_class.service}_{name}".upper()


def _shown_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "computed"
    if field.default in ((), None, ""):
        return "none"
    if isinstance(field.default, enum.Enum):
        return str(field.default.value)
    return ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)


def _alternatives(field: FieldInfo) -> tuple[object, ...]:
    """The types of a union without None, or the one type that the field has."""
    annotation: object = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for kind in get_args(annotation) if kind is not type(None))
    return (annotation,)


def _is_bool(field: FieldInfo) -> bool:
    return bool in _alternatives(field)


def _is_list(field: FieldInfo) -> bool:
    return any(get_origin(kind) in (tuple, list) for kind in _alternatives(field))


def _metavar(field: FieldInfo) -> str:
    kind = _alternatives(field)[0]
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "VALUE") if isinstance(kind, type) else "VALUE"
