"""What the recipe sets in whatever backbone it names."""

import pytest
import torch

from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from training.stages.model import set_attention_dropout

GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_embd": 8, "n_head": 2, "n_layer": 1, "attn_pdrop": 0.3}
LLAMA = {
    "model_type": "llama", "vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "num_hidden_layers": 1, "attention_dropout": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("backbone", [GPT2, LLAMA], ids=lambda words: words["model_type"])
def test_attention_drops_the_share_of_the_recipe_whatever_the_backbone_says(backbone, share):
    config = CLLM4RecConfig(
        backbone_config=backbone | {"embd_pdrop": 0.0, "resid_pdrop": 0.0}, num_users=3, num_items=4
    )
    torch.manual_seed(0)
    model = CLLM4RecForRecommendation(config).train()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7]])

    def varies():
        passes = [model.model(ids, document_lengths=(16,)).last_hidden_state for _ in range(2)]
        return not torch.equal(*passes)

    assert varies(), "without the setting nothing is dropped, so that nothing is looked at"
    set_attention_dropout(model, share)
    assert varies() == (share > 0)
