"""What goes to the environment that has RecTools, and what comes back; RecTools itself is not needed."""

import sys

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from benchmarks.sasrec import ranked_by_sasrec
from training.data.ragged import Ragged

STANDIN = """
import csv, sys
pairs, ranked = (path for path in sys.argv[2:4])
rows = list(csv.reader(open(pairs)))[1:]
with open(ranked, "w") as file:
    file.write("user_id,item_id\\n")
    for user in sorted({row[0] for row in rows}, reverse=True):  # every item, the greatest first
        file.writelines(f"{user},{item}\\n" for item in range(6, -1, -1))
print(*sys.argv[4:], rows, file=sys.stderr)
"""


@pytest.mark.parametrize("sees_validation", [False, True])
def test_what_users_had_is_left_out_and_who_is_unknown_gets_what_is_popular(tmp_path, capfd, sees_validation):
    python = tmp_path / "python"
    (tmp_path / "standin.py").write_text(STANDIN)
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{tmp_path}/standin.py" "$@"\n')
    python.chmod(0o755)
    train = np.array([0, 2]), Ragged.from_lists([[3, 6], [3]], np.int32)
    validation = np.array([2]), Ragged.from_lists([[5]], np.int32)
    seen = csr_matrix((np.ones(4), ([0, 0, 2, 2], [3, 6, 3, 5])), shape=(3, 7))
    users = np.array([0, 1, 2])
    best = ranked_by_sasrec(str(python), train, validation, seen, users, 3, sees_validation=sees_validation)
    assert best.tolist() == [[5, 4, 2], [3, 6, 0], [6, 4, 2]]
    told = capfd.readouterr().err
    assert ("--sees-validation" in told) == sees_validation
    assert "--depth 5" in told
    rows = [["0", "3", "train"], ["0", "6", "train"], ["2", "3", "train"], ["2", "5", "validation"]]
    assert str(rows) in told
