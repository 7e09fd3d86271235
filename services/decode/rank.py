"""`python -m services.decode.rank STEP_FD KV_FD`: one rank of a decode worker; started by its front only."""

import logging
import sys

from common.worker.rank_process import run_rank
from services.decode.kv_receiver import KVReceiver

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s decode-rank %(name)s: %(message)s")
    sys.exit(run_rank(sys.argv[1:], KVReceiver))
