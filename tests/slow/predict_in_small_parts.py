"""Run training/predict.py with parts of five users each; process number `KILLED` is killed before its `BATCH`-th batch.

accelerate launch … tests/slow/predict_in_small_parts.py KILLED BATCH --config shop.yaml
"""

import os
import signal
import sys

from training import predict
from training.evaluation import predictions
from training.evaluation.measure import Ranker


def main():
    """A killed process of -1: none."""
    killed, batch = map(int, sys.argv[1:3])
    sys.argv[1:3] = []
    rank, done = Ranker.__call__, []

    def watched(ranker, users):
        done.append(users)
        if int(os.environ.get("RANK", "0")) == killed and len(done) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return rank(ranker, users)

    predictions.USERS_PER_PART, Ranker.__call__ = 5, watched
    predict.main()


if __name__ == "__main__":
    main()
