"""Which devices UCX may use, and what is said when it has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from ucxx._lib.libucxx import UCXContext

from common.transport.ucx_devices import device_options, parse_devices

_INFO = """#
#            md 1  :  component 1  tcp
#
#      resource 0  :  md 0  dev 0  flags -- self/memory
#      resource 1  :  md 1  dev 1  flags -- tcp/eth0
#      resource 2  :  md 1  dev 2  flags -- tcp/lo
#      resource 3  :  md 2  dev 0  flags -- sysv/memory
#      resource 4  :  md 5  dev 3  flags -- cuda_ipc/cuda
#      resource 5  :  md 6  dev 4  flags -- rc_mlx5/mlx5_0:1
"""
_OPEN = """
import asyncio
from common.errors import FailedPrecondition
from common.transport.registry import open_endpoint
async def main():
    try:
        await open_endpoint("ucx://127.0.0.1:0", "p")
    except FailedPrecondition as error:
        print(error)
asyncio.run(main())
"""


def test_network_devices_are_told_from_the_rest() -> None:
    assert parse_devices(_INFO) == ["eth0", "lo", "mlx5_0:1"]
    assert (
        parse_devices("\n".join(line for line in _INFO.splitlines() if "tcp" not in line and "mlx" not in line)) == []
    )


def test_the_list_of_the_real_library_is_understood() -> None:
    assert "lo" in parse_devices(UCXContext({}).info)
    assert parse_devices(UCXContext(device_options("127.0.0.1")).info) == ["lo"]


def test_only_a_loopback_address_confines_ucx() -> None:
    assert device_options("127.0.0.2") == {"NET_DEVICES": "lo"}
    assert device_options("10.0.0.7") == device_options("0.0.0.0") == {}


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_machine_without_sys_is_told_so() -> None:
    hide_sys = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none /sys && exec "$@"', "sh"]
    if subprocess.run([*hide_sys, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not allowed here")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    python = [sys.executable, "-c", _OPEN]
    told = subprocess.run(
        [*hide_sys, *python], capture_output=True, text=True, timeout=100, env=environment, check=True
    )
    assert "UCX needs /sys to be mounted" in told.stdout
