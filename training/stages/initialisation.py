"""What a matrix factorisation gives a language model: a start for its ID embeddings and a teacher for its softmax.

Neither is in the paper; both are fields of the recipe (`method.initialisation`, `method.distillation`).
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix

from modeling_cllm4rec import CLLM4RecModel
from training.evaluation.baselines import fit_baselines
from training.files import written_whole

logger = logging.getLogger(__name__)

TEACHER_SCALES = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
USERS_PER_BLOCK = 1024


@dataclass(frozen=True)
class Teacher:
    """Factors of iALS fitted on the training split, with the inverse temperature that suits validation best.

    Attributes:
        user_factors: `(users, factors)` float32.
        item_factors: `(items, factors)` float32.
        scale: What scores are multiplied by before the softmax.
    """

    user_factors: np.ndarray
    item_factors: np.ndarray
    scale: float

    def logits(self, users: np.ndarray) -> np.ndarray:
        """Unnormalised log-probabilities `(users, items)`, float32."""
        return self.scale * self.user_factors[users] @ self.item_factors.T


def ials_teacher(train: csr_matrix, validation: csr_matrix, seed: int, cache: Path) -> Teacher:
    """Fit iALS with settings chosen on validation, or read what an earlier call for the same pairs wrote to `cache`."""
    path = cache / "factors.safetensors"
    mark = pairs_fingerprint(train, validation, seed)
    if not path.is_file() or fingerprint_of(path) != mark:
        fitted = fit_baselines(train, validation, ["ials"], seed=seed)["ials"]
        assert fitted.factors is not None
        user_factors, item_factors = (np.ascontiguousarray(table, np.float32) for table in fitted.factors)
        scale = best_scale(user_factors, item_factors, train, validation)
        logger.info(
            "teacher: iALS %s, validation NDCG@100 %.4f, scale %g",
            fitted.settings,
            fitted.validation_ndcg_at_100,
            scale,
        )
        with written_whole(cache) as target:
            tables = {"users": user_factors, "items": item_factors, "scale": np.asarray([scale], np.float32)}
            save_file(tables, target / path.name, metadata={"fingerprint": mark})
    tables = load_file(path)
    return Teacher(tables["users"], tables["items"], float(tables["scale"][0]))


def pairs_fingerprint(train: csr_matrix, validation: csr_matrix, seed: int) -> str:
    """What the factors depend on: the pairs of both splits and the seed."""
    digest = hashlib.sha256(f"{seed} {train.shape}".encode())
    for matrix in (train, validation):
        digest.update(matrix.indptr.tobytes() + matrix.indices.tobytes())
    return digest.hexdigest()


def fingerprint_of(path: Path) -> str | None:
    """The fingerprint that was written beside the factors."""
    with safe_open(path, "numpy") as file:
        return (file.metadata() or {}).get("fingerprint")


def best_scale(user_factors: np.ndarray, item_factors: np.ndarray, train: csr_matrix, validation: csr_matrix) -> float:
    """The inverse temperature under which the validation items are likeliest, the training items left out of the softmax."""
    users = np.flatnonzero(np.diff(validation.indptr))[:USERS_PER_BLOCK]
    scores = torch.from_numpy(user_factors[users] @ item_factors.T)
    seen = torch.from_numpy(train[users].toarray() > 0)
    held_out = torch.from_numpy(validation[users].toarray())
    likelihood = [
        (held_out * (scale * scores).masked_fill(seen, -torch.inf).log_softmax(-1).masked_fill(seen, 0)).sum().item()
        for scale in TEACHER_SCALES
    ]
    return TEACHER_SCALES[int(np.argmax(likelihood))]


def start_from_factors(base: CLLM4RecModel, teacher: Teacher, std: float) -> None:
    """Set the ID tables of both towers to the factors' best approximation of the model's width, scaled to `std`."""
    width = base.user_embeddings.embedding_dim
    users, items = fit_width(teacher.user_factors, teacher.item_factors, width)
    for tower in ("collaborative", "content") if base.config.content_tower else ("collaborative",):
        for table, factors in zip(base.tables(tower), (users, items), strict=True):
            start = torch.from_numpy(factors * (std / max(float(factors.std()), 1e-12)))
            table.weight.data[:, : start.shape[1]] = start.to(table.weight)


def fit_width(users: np.ndarray, items: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank-`width` factors nearest to users · itemsᵀ (Eckart-Young), sharing the singular values evenly."""
    (q_users, r_users), (q_items, r_items) = np.linalg.qr(users), np.linalg.qr(items)
    left, values, right = np.linalg.svd(r_users @ r_items.T)
    rank = min(width, len(values))
    root = np.sqrt(values[:rank])
    return (q_users @ left[:, :rank] * root).astype(np.float32), (q_items @ right[:rank].T * root).astype(np.float32)
