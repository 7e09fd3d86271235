"""`python -m services.prefill.rank STEP_FD KV_FD`: one rank of a prefill worker; started by its front only."""

import sys

from common.telemetry.request_log import configure_logging
from common.worker.rank_process import run_rank
from services.prefill.kv_sender import KVSender

if __name__ == "__main__":
    configure_logging("INFO", "prefill-rank")
    sys.exit(run_rank(sys.argv[1:], KVSender))
