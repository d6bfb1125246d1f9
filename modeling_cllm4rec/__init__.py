"""CLLM4Rec by import: the same classes that a Hub folder carries, registered with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_cllm4rec import CLLM4RecConfig
from .modeling_cllm4rec import (
    CLLM4RecForCollaborativeLM,
    CLLM4RecForContentLM,
    CLLM4RecForRecommendation,
    CLLM4RecModel,
    CLLM4RecPreTrainedModel,
    CollaborativeGPTwithItemLMHeadBatch,
    CollaborativeGPTwithItemRecommendHead,
    ContentGPTForUserItemWithLMHeadBatch,
    GPT4RecommendationBaseModel,
    RecommendationOutput,
)
from .pipeline_cllm4rec import RecommendationPipeline
from .ranking_cllm4rec import RankedItems
from .tokenization_cllm4rec import TokenizerWithUserItemIDTokens

AutoConfig.register("cllm4rec", CLLM4RecConfig)
AutoModel.register(CLLM4RecConfig, CLLM4RecModel)
AutoModelForCausalLM.register(CLLM4RecConfig, CLLM4RecForContentLM)
AutoModelForSequenceClassification.register(CLLM4RecConfig, CLLM4RecForRecommendation)
PIPELINE_REGISTRY.register_pipeline(
    "recommendation", RecommendationPipeline, pt_model=AutoModelForSequenceClassification
)

__version__ = "0.1.0"

__all__ = [
    "CLLM4RecConfig",
    "CLLM4RecForCollaborativeLM",
    "CLLM4RecForContentLM",
    "CLLM4RecForRecommendation",
    "CLLM4RecModel",
    "CLLM4RecPreTrainedModel",
    "CollaborativeGPTwithItemLMHeadBatch",
    "CollaborativeGPTwithItemRecommendHead",
    "ContentGPTForUserItemWithLMHeadBatch",
    "GPT4RecommendationBaseModel",
    "RankedItems",
    "RecommendationOutput",
    "RecommendationPipeline",
    "TokenizerWithUserItemIDTokens",
]
