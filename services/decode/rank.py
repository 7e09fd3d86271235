"""`python -m services.decode.rank STEP_FD KV_FD`: one rank of a decode worker; started by its front only."""

import sys

from common.telemetry.request_log import configure_logging
from common.worker.rank_process import run_rank
from services.decode.kv_receiver import KVReceiver

if __name__ == "__main__":
    configure_logging("INFO", "decode-rank")
    sys.exit(run_rank(sys.argv[1:], KVReceiver))
