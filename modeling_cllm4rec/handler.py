"""What Hugging Face Inference Endpoints call: `EndpointHandler(path)` once, then `handler(data)` for each request.

It stands in the repo beside the model and needs nothing but transformers and torch.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import pipeline


class EndpointHandler:
    """Serves recommendations from the folder that holds this file.

    Args:
        path: The model's folder; by default the one of this file.

    Example:
        >>> handler = EndpointHandler("runs/sample/model")
        >>> handler({"inputs": {"history": ["python3-numpy", "python3-matplotlib"]}, "parameters": {"top_k": 1}})
        [{'item': 'python3-scipy', 'title': 'python3-scipy', 'score': 0.1, 'rank': 1}]
    """

    def __init__(self, path: str = "") -> None:
        self.recommend = pipeline(
            "recommendation",
            model=path or str(Path(__file__).parent),
            trust_remote_code=True,
            device=0 if torch.cuda.is_available() else "cpu",
        )

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Recommend.

        Args:
            data: `inputs`, one person (`{"user": raw id}`, `{"history": [raw item ids]}`, `{"text": "…"}` or several of them) or a
                list of people, and *optional* `parameters`: `top_k`, `candidates`, `exclude`, `exclude_seen`, `batch_size`.

        Returns:
            Per person a list of `{"item", "title", "score", "rank"}`, best first; the list itself for one person.

        Raises:
            ValueError: naming what is missing or unknown in the request.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('a request is {"inputs": {"history": [raw item ids]}, "parameters": {"top_k": 10}}')
        return self.recommend(data["inputs"], **(data.get("parameters") or {}))
