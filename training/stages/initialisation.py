"""A start for the ID embeddings from a matrix factorisation (`method.initialisation`; the paper starts at random)."""

import torch

from modeling_cllm4rec import CLLM4RecModel
from training.stages.teacher import Teacher


def start_from_factors(base: CLLM4RecModel, teacher: Teacher, std: float) -> None:
    """Set the ID tables of both towers to the factors' best approximation of the model's width, scaled to `std`."""
    width = base.user_embeddings.embedding_dim
    users, items = teacher.factors(width)
    for tower in ("collaborative", "content") if base.config.content_tower else ("collaborative",):
        for table, factors in zip(base.tables(tower), (users, items), strict=True):
            # One user's single factor does not deviate.
            spread = float(factors.std()) or float(abs(factors).max()) or 1.0
            start = torch.from_numpy(factors * (std / spread))
            table.weight.data[:, : start.shape[1]] = start.to(table.weight)
