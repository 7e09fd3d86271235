"""Makes a process compile Triton kernels for Hopper instead of launching them: no GPU is needed for that."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def compile_for_hopper(on_compiled: Callable[[Any], None] = lambda _: None) -> None:
    """From now on, in this process. Kernels land in Triton's cache on disk; `on_compiled` gets each."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        """The part of a driver that compiling asks for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        on_compiled(kernel)
        return kernel

    driver.set_active(Hopper())
    JITFunction.run = compile_only
