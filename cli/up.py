"""Start a router, prefill and decode workers on this machine, and show how they are until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from rich.console import Console
from rich.live import Live

from cli.client import DEFAULT_ADDRESS
from cli.console import open_console
from cli.deployment import Deployment, DeploymentSpec
from cli.flag_types import host, port, seconds, whole
from cli.status_view import StatusView
from common.errors import InvalidArgument
from common.worker.free_port import free_ports

_MAX_WORKERS = 256
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "pystdlib-7m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton up`."""
    default_host, default_port = DEFAULT_ADDRESS.split(":")
    num_ranks, num_workers = whole(1, 64), whole(1, _MAX_WORKERS)
    add = parser.add_argument
    add("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory (default: the shipped one)")
    add("--prefill", type=whole(0, _MAX_WORKERS), default=1, metavar="P", help="prefill workers (1)")
    add("--decode", type=num_workers, default=1, metavar="D", help="decode workers (1)")
    add("--prefill-tp", type=num_ranks, default=1, metavar="N", help="ranks of each prefill worker (1)")
    add("--decode-tp", type=num_ranks, default=1, metavar="N", help="ranks of each decode worker (1)")
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
    add("--router-processes", type=whole(1, 64), default=1, metavar="N", help="router processes behind the port (1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where ranks compute; each GPU has one rank (cpu)")
    add(
        "--metrics-port",
        type=port,
        default=0,
        metavar="PORT",
        help="Prometheus port of the first router process; the others follow, then the workers (0: no metrics)",
    )
    add("--host", type=host, default=default_host, help=f"address to listen on ({default_host})")
    add("--port", type=port, default=int(default_port), help=f"port of the router ({default_port}; 0: any)")
    add(
        "--prefill-arg",
        action="append",
        default=[],
        metavar="FLAG",
        help="further flag of the prefill workers",
    )
    add("--decode-arg", action="append", default=[], metavar="FLAG", help="further flag of the decode workers")
    add("--router-arg", action="append", default=[], metavar="FLAG", help="further flag of the router")
    logs = "one log file for each process goes to DIR/HOST-PORT, which no other deployment writes to (baton-logs)"
    add("--log-dir", type=Path, default=Path("baton-logs"), metavar="DIR", help=logs)
    ready = "seconds until every worker must be ready (120)"
    add("--ready-timeout", type=seconds, default=120.0, metavar="S", help=ready)


# A worker that always computes prompts beside its decode steps has such steps captured.
_CAPTURES: dict[str, tuple[str, ...]] = {"never": (), "when-empty": (), "always": ("--capture-chunks",)}


def spec_from(args: argparse.Namespace) -> DeploymentSpec:
    """The deployment that the flags describe. Raises `InvalidArgument` for flags that do not go together."""
    if not args.prefill and args.local_prefill == "never":
        limit = "at least 1, unless decode workers compute prompts: --local-prefill always or when-empty"
        raise InvalidArgument("--prefill", args.prefill, limit)
    if ":" in args.host:
        raise InvalidArgument("--host", args.host, "an IPv4 address or a name: KV transports know no other")
    router_port = args.port or free_ports(1, args.host)[0]
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
        router_port=router_port,
        prefill_args=tuple(args.prefill_arg),
        decode_args=(*_CAPTURES[args.local_prefill], *args.decode_arg),
        router_args=("--local-prefill", args.local_prefill, "--first-token", args.first_token, *args.router_arg),
        log_dir=args.log_dir / f"{args.host}-{router_port}",
    )


async def run(args: argparse.Namespace) -> int:
    """Run `baton up` until SIGINT, SIGTERM or SIGHUP (the terminal is gone)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    console = open_console()
    view = StatusView()
    spec = spec_from(args)
    async with Deployment(spec, on_event=view.add_event) as deployment:
        console.print(f"starting {len(deployment.processes)} processes, logs in {spec.log_dir}/", soft_wrap=True)
        ready = asyncio.create_task(deployment.ready(args.ready_timeout))
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                console.print(
                    f"ready: baton generate --address {deployment.router_address} 'def main('", soft_wrap=True
                )
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
