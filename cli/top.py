"""Watch a deployment that runs: its workers, and the latencies that its clients see. q or Ctrl-C ends it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live

from cli.console import open_console
from cli.flag_types import host_port, number
from cli.scrape import Scrape, scrape
from cli.top_view import TopView
from cli.worker_watch import follow_status, get_status
from common.errors import InvalidArgument, Unavailable

_TIMEOUT_S = 3.0
_WINDOW_S = 30.0  # of the router's latencies: a single second has too few requests for a p99


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton top`."""
    add = parser.add_argument
    add("--prefill", type=_addresses, default=[], metavar="A,B", help="prefill workers, host:port")
    add("--decode", type=_addresses, default=[], metavar="A,B", help="decode workers, host:port")
    add("--router-metrics", default="", metavar="URL,URL", help="http://host:port/metrics of each router process")
    add("--interval", type=number(0.1, 3600), default=1.0, metavar="S", help="seconds between two looks (1)")
    add("--once", action="store_true", help="print once, with latencies since the start, and exit")


async def run(args: argparse.Namespace) -> int:
    """`baton top`. With --once 1 if anything could not be reached."""
    addresses, urls = args.prefill + args.decode, _split(args.router_metrics)
    if not addresses and not urls:
        raise InvalidArgument("--prefill", "", "name workers in --prefill and --decode, or --router-metrics")
    view, console = TopView(addresses), open_console()
    if args.once:
        complete = await _look_once(view, addresses, urls)
        console.print(view)
        return 0 if complete else 1
    await _watch(view, console, addresses, urls, args.interval)
    return 0


async def _look_once(view: TopView, addresses: Sequence[str], urls: Sequence[str]) -> bool:
    """Whether everybody answered."""
    statuses = await asyncio.gather(*(get_status(address, _TIMEOUT_S) for address in addresses))
    for address, status in zip(addresses, statuses, strict=True):
        view.set_status(address, status)
    if urls:
        try:
            view.set_router(Scrape(), await _scrape_all(urls), 0.0)
        except Unavailable as error:
            view.set_router_error(str(error))
            return False
    return None not in statuses


async def _watch(
    view: TopView, console: Console, addresses: Sequence[str], urls: Sequence[str], every_s: float
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signal_number, stop.set)
    async with asyncio.TaskGroup() as tasks:
        watchers = [tasks.create_task(_follow(view, address)) for address in addresses]
        if urls:
            watchers.append(tasks.create_task(_follow_router(view, urls, every_s)))
        with _quit_key(stop), Live(view, console=console, refresh_per_second=max(1.0, 1 / every_s), screen=True):
            await stop.wait()
        for watcher in watchers:
            watcher.cancel()


async def _follow(view: TopView, address: str) -> None:
    await follow_status(address, lambda status: view.set_status(address, status))


async def _follow_router(view: TopView, urls: Sequence[str], every_s: float) -> None:
    looks: deque[tuple[float, Scrape]] = deque()
    while True:
        try:
            latest = (time.monotonic(), await _scrape_all(urls))
        except Unavailable as error:
            view.set_router_error(str(error))
            looks.clear()
        else:
            looks.append(latest)
            while len(looks) > 2 and looks[0][0] < latest[0] - _WINDOW_S:
                looks.popleft()
            if len(looks) > 1:
                view.set_router(looks[0][1], latest[1], latest[0] - looks[0][0])
        await asyncio.sleep(every_s)


async def _scrape_all(urls: Sequence[str]) -> Scrape:
    return Scrape.merged(await asyncio.gather(*(scrape(url, _TIMEOUT_S) for url in urls)))


@contextlib.contextmanager
def _quit_key(stop: asyncio.Event) -> Iterator[None]:
    """`q` sets `stop`, where there is a keyboard; the terminal is as before afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    loop, keyboard = asyncio.get_running_loop(), sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed() -> None:
        keys = os.read(keyboard, 64)
        if not keys or b"q" in keys.lower():
            stop.set()

    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, pressed)
    try:
        yield
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _addresses(text: str) -> list[str]:
    return [host_port(part) for part in _split(text)]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
