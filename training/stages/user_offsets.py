"""What is added to the states of known users when training has ended, in closed form, as validation likes it.

Not in the paper. A state has as many numbers as an embedding, and a teacher's scores say more of a known user than the head has
learnt from samples of histories; one's own text says more again. Both are brought into the space of states by least squares.
"""

import logging
from dataclasses import asdict, dataclass

import numpy as np
import torch

from modeling_cllm4rec import CLLM4RecForRecommendation
from training.data.batches import layout_of
from training.data.corpora import Corpora
from training.evaluation.scoring import ModelScores, split_matrix
from training.stages.teacher import Teacher
from training.stages.text_map import COMPARED_USERS, WEIGHTS, best_weight, item_head, some, to_states

logger = logging.getLogger(__name__)

TEACHER_SHARES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
USERS_AT_A_TIME = 2**16


@dataclass(frozen=True)
class FittedOffsets:
    """How the offsets were chosen on validation: the teacher's share of a state, and the weight of one's own text."""

    teacher_share: float
    text_weight: float
    validation_ndcg_at_100: float


def fit_user_offsets(
    model: CLLM4RecForRecommendation,
    corpora: Corpora,
    teacher: Teacher | None,
    said: np.ndarray | None,
    seed: int,
    weights: tuple[float, float] | None = None,
) -> FittedOffsets | None:
    """Give a trained model its users' offsets; None, and no table, where validation likes none.

    Args:
        model: Changed in place.
        corpora: What it was trained on.
        teacher: Whose scores are brought in.
        said: What users' own texts add, `(num_users, width)`, of the text map.
        seed: Of the users who are looked at where there are too many.
        weights: The teacher's share and the weight of texts, where they are not to be chosen on validation.
    """
    if not model.config.user_embeddings:
        return None
    train, validation = split_matrix(corpora, "recommendation"), split_matrix(corpora, "validation")
    scores = ModelScores(model, *corpora.histories("recommendation"), layout_of(corpora), model.config.max_history)
    weight, bias = item_head(model)
    matrix = to_states(weight).T
    matrix = matrix - matrix.mean(0)  # what all items share ranks none of them

    def parts(users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States of users, what they lack of the teacher's, and what their texts say, `(users, width)` each."""
        states = scores.states(users).float().cpu().numpy()
        lacking = 0 * states if teacher is None else teacher.projected(users, matrix) - bias @ matrix - states
        return states, lacking, 0 * states if said is None else said[users]

    def choose() -> tuple[float, float, float]:
        """The teacher's share and the texts' weight that validation likes best, and its NDCG@100 there."""
        share, times, reached = 0.0, 0.0, 0.0
        rng = np.random.default_rng(seed)
        judged = some((np.diff(train.indptr) > 0) & (np.diff(validation.indptr) > 0), COMPARED_USERS, rng)
        if not len(judged):
            return share, times, reached
        states, lacking, of_text = parts(judged)
        # Each by itself while the other stands still, the teacher's share once more at the end.
        for name in ("share", "text", "share"):
            if name == "share" and teacher is not None:
                share, reached = best_weight(
                    lambda one: (states + one * lacking + times * of_text, weight, bias),  # noqa: B023
                    TEACHER_SHARES, train, validation, judged,
                )  # fmt: skip
            elif name == "text" and said is not None:
                times, reached = best_weight(
                    lambda one: (states + share * lacking + one * of_text, weight, bias),  # noqa: B023
                    WEIGHTS, train, validation, judged,
                )  # fmt: skip
        return share, times, reached

    share, times, reached = choose() if weights is None else (*weights, 0.0)
    if not (share or times):
        return None
    table = np.zeros((corpora.num_users, weight.shape[1]), np.float32)
    known = np.flatnonzero(np.diff(train.indptr) > 0)
    for start in range(0, len(known), USERS_AT_A_TIME):
        users = known[start : start + USERS_AT_A_TIME]
        _, lacking, of_text = parts(users)
        table[users] = share * lacking + times * of_text
    model.config.user_offsets = True
    model.model.user_offsets = torch.nn.Embedding.from_pretrained(torch.from_numpy(table)).to(model.device, model.dtype)
    fitted = FittedOffsets(share, times, reached)
    logger.info("user offsets: %s", ", ".join(f"{name} {value:.4g}" for name, value in asdict(fitted).items()))
    return fitted
