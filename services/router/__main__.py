"""`python -m services.router`: the only place of the router where the environment is read."""

from __future__ import annotations

import asyncio
import os
import sys

from common.config import load_config_or_exit
from common.errors import BatonError
from common.parent_death import PARENT_GONE, end_with_parent
from common.rpc.status import find_baton_error
from common.telemetry.request_log import configure_logging
from services.router.config import RouterConfig
from services.router.process import run_router
from services.router.supervisor import own_command, supervise


def main() -> None:
    """Run one router process, or a supervisor of several."""
    argv = sys.argv[1:]
    config = load_config_or_exit(RouterConfig, argv, os.environ)
    configure_logging(config.log_level, config.service)
    end_with_parent(os.environ, PARENT_GONE)
    failure: BatonError | None = None
    try:
        if config.processes > 1:
            asyncio.run(supervise(own_command(), argv, config))
        else:
            asyncio.run(run_router(config))
    except* BatonError as group:
        failure = find_baton_error(group)
    if failure is not None:
        sys.stderr.write(f"baton router: {failure}\n")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
