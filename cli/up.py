"""Start a router, prefill and decode workers on this machine, and show how they are until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from rich.console import Console
from rich.live import Live

from cli.client import DEFAULT_ADDRESS
from cli.deployment import Deployment, DeploymentSpec
from cli.status_view import StatusView

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "pystdlib-7m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton up`."""
    host, port = DEFAULT_ADDRESS.split(":")
    add = parser.add_argument
    add("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory (default: the shipped one)")
    add("--prefill", type=int, default=1, metavar="P", help="prefill workers (1)")
    add("--decode", type=int, default=1, metavar="D", help="decode workers (1)")
    add("--prefill-tp", type=int, default=1, metavar="N", help="ranks of each prefill worker (1)")
    add("--decode-tp", type=int, default=1, metavar="N", help="ranks of each decode worker (1)")
    add(
        "--local-prefill",
        choices=("never", "when-empty", "always"),
        default="never",
        help="when decode workers compute prompts themselves; always needs no prefill worker (never)",
    )
    add(
        "--first-token",
        choices=("eager", "steady"),
        default="eager",
        help="release the first token at once, or when its sequence's first decode step is under way (eager)",
    )
    add("--router-processes", type=int, default=1, metavar="N", help="router processes behind the port (1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where ranks compute; each GPU has one rank (cpu)")
    add(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="Prometheus port of the first router process; the others follow, then the workers (0: no metrics)",
    )
    add("--host", default=host, help=f"address to listen on ({host})")
    add("--port", type=int, default=int(port), help=f"port of the router ({port})")
    add(
        "--prefill-arg",
        action="append",
        default=[],
        metavar="FLAG",
        help="further flag of the prefill workers",
    )
    add("--decode-arg", action="append", default=[], metavar="FLAG", help="further flag of the decode workers")
    add("--router-arg", action="append", default=[], metavar="FLAG", help="further flag of the router")
    add("--log-dir", type=Path, default=Path("baton-logs"), help="one log file for each process (baton-logs)")
    add("--ready-timeout", type=float, default=120.0, help="seconds until every worker must be ready (120)")


# A worker that always computes prompts beside its decode steps has such steps captured.
_CAPTURES: dict[str, tuple[str, ...]] = {"never": (), "when-empty": (), "always": ("--capture-chunks",)}


def spec_from(args: argparse.Namespace) -> DeploymentSpec:
    """The deployment that the flags describe."""
    return DeploymentSpec(
        model=args.model,
        num_prefill=args.prefill,
        num_decode=args.decode,
        prefill_tp=args.prefill_tp,
        decode_tp=args.decode_tp,
        router_processes=args.router_processes,
        device=args.device,
        metrics_port=args.metrics_port,
        host=args.host,
        router_port=args.port,
        prefill_args=tuple(args.prefill_arg),
        decode_args=(*_CAPTURES[args.local_prefill], *args.decode_arg),
        router_args=("--local-prefill", args.local_prefill, "--first-token", args.first_token, *args.router_arg),
        log_dir=args.log_dir,
    )


async def run(args: argparse.Namespace) -> int:
    """Run `baton up` until SIGINT, SIGTERM or SIGHUP (the terminal is gone)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    console = Console()
    view = StatusView()
    async with Deployment(spec_from(args), on_event=view.add_event) as deployment:
        console.print(f"starting {len(deployment.processes)} processes, logs in {args.log_dir}/")
        ready = asyncio.create_task(deployment.ready(args.ready_timeout))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                console.print(f"ready: baton generate --address {deployment.router_address} 'def main('")
                console.print("watch: baton top", *_top_flags(deployment), soft_wrap=True)
                await _show(view, deployment, stopped, console)
        finally:
            ready.cancel()
            stopped.cancel()
        console.print("stopping")
    return 0


async def _show(view: StatusView, deployment: Deployment, stopped: asyncio.Task[bool], console: Console) -> None:
    """Keep the live view until `stopped` is done."""
    with Live(view, console=console, refresh_per_second=4, transient=False):
        watchers = [asyncio.create_task(view.watch(worker)) for worker in deployment.processes[:-1]]
        try:
            await stopped
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)


def _top_flags(deployment: Deployment) -> list[str]:
    """What `baton top` needs to show this deployment."""
    lists = {
        "prefill": [worker.address for worker in deployment.prefill],
        "decode": [worker.address for worker in deployment.decode],
        "router-metrics": deployment.router_metrics,
    }
    return [f"--{name} {','.join(values)}" for name, values in lists.items() if values]
