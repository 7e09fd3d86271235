"""The map of the tree in docs/architecture.md names what is there, and a star says what a contract holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (
    "services/router",
    "services/prefill",
    "services/decode",
    "common",
    "common/rpc",
    "common/sampling",
    "common/transport",
    "common/parallel",
    "common/kernels",
    "common/models",
    "common/telemetry",
    "common/kvcache",
    "common/worker",
)


def _mapped() -> dict[str, set[str]]:
    """Names as they stand behind each folder in the Layout, stars included."""
    text = (ROOT / "docs/architecture.md").read_text()
    (block,) = re.findall(r"## Layout\n\n```\n(.*?)\n```", text, re.DOTALL)
    found: dict[str, set[str]] = {}
    folder = ""
    for line in block.splitlines():
        names = line.split()
        if not line.startswith(" "):
            folder, names = names[0].rstrip("/"), names[1:]
        found.setdefault(folder, set()).update(names)
    return found


def _pure() -> set[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if each["name"] == "modules that decide are pure")
    return set(contract["source_modules"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_map_names_every_module_of_a_folder_and_no_other(folder: str) -> None:
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "__main__"}
    assert {name.rstrip("*") for name in _mapped()[folder]} - {"+"} == modules


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_star_is_a_contract(folder: str) -> None:
    starred = {f"{folder.replace('/', '.')}.{name[:-1]}" for name in _mapped()[folder] if name.endswith("*")}
    assert starred == {name for name in _pure() if name.rpartition(".")[0] == folder.replace("/", ".")}
