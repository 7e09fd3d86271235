"""`python -m services.prefill.rank STEP_FD KV_FD`: one rank of a prefill worker; started by its front only."""

import logging
import sys

from common.worker.rank_process import run_rank
from services.prefill.kv_sender import KVSender

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s prefill-rank %(name)s: %(message)s")
    sys.exit(run_rank(sys.argv[1:], KVSender))
