"""The typed recipe of a run: every knob, its default place, its meaning.

A recipe is `default.yaml` (or another method file) with a set's file laid over it and `field=value` words over both.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def knob(description: str, default: Any = None, *, said_only: bool = False) -> Any:
    """Make a field of the recipe.

    Args:
        description: What `--list-fields` prints.
        default: Its default.
        said_only: Whether it is read by people alone, so that no checkpoint depends on it.
    """
    metadata = {"help": description, "said_only": said_only}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SideTable:
    """A table with one row an item (or a user) and text about it."""

    path: str | None = knob(
        "CSV, TSV, Parquet or JSON lines file, here or on the Hub as in data.path; none: no such table"
    )
    id_column: str = knob("column with the raw id", "id")
    title_column: str | None = knob("column shown to people as the name; none: the raw id is shown")
    text_columns: list[str] = knob("columns that make up the text, joined in this order", [])


@dataclass(frozen=True)
class Data:
    """Where the interactions come from, how they are filtered and split."""

    format: Literal["table", "ml-100k", "amazon-reviews", "sequences", "dataset"] = knob(
        "table: CSV, TSV, Parquet or JSON lines by the file's name (.gz too); ml-100k: its folder or zip; amazon-reviews: JSON "
        "lines of the 2014, 2018 or 2023 release; sequences: a line a user, the user and then items in order of time, space "
        "separated; dataset: a `datasets` repo on the Hub or a folder that load_dataset opens",
        "table",
    )
    path: str | None = knob(
        "file, folder or repo; relative to the current folder, else to the project's; a file of a Hub repo is "
        "hf://datasets/me/data/file.csv; me/data@revision for another revision than main"
    )
    dataset_split: str = knob("with format dataset: the split that is read; several as in train+test, or all", "train")
    user_column: str = knob("column with the raw user id", "user")
    item_column: str = knob("column with the raw item id", "item")
    rating_column: str | None = knob("column with a numeric rating; none: every row is an interaction")
    timestamp_column: str | None = knob("column with a unix time or an ISO date; none: the order of the rows")
    review_column: str | None = knob("column with the review's text")
    items: SideTable = field(default_factory=SideTable, metadata={"help": "table of items"})
    users: SideTable = field(default_factory=SideTable, metadata={"help": "table of users"})
    min_rating: float | None = knob("rows with a lower rating are left out")
    min_user_interactions: int = knob("users with fewer interactions are left out", 1)
    min_item_interactions: int = knob(
        "items with fewer interactions are left out (both repeated until stable: the k-core)", 1
    )
    split: Literal["random", "leave_last_out", "given"] = knob(
        "random: per user 80/10/10; leave_last_out: each user's last item is test, the one before validation; given: a column",
        "random",
    )
    split_column: str = knob("with split given: column with train, validation or test", "split")
    split_path: str | None = knob(
        "with split given: a table of its own with user_column, item_column and split_column; pairs that it does not list are left out"
    )
    review_prompt: str = knob("prompt of a review's document", "{user} writes the following review for {item}:")
    item_prompt: str = knob("prompt of the document with an item's title and text", "The title and genres of {item}:")
    user_prompt: str = knob("prompt of the document with a user's text", "{user} is described as:")
    examples: list[Any] = knob(
        "histories (lists of raw item ids) whose recommendations are shown and published; none: they are made up, of popular "
        "items and their neighbours",
        [],
    )
    license: str | None = knob("licence of the data, for the model card (an identifier of the Hub)")
    source: str | None = knob("where the data come from, for the model card")
    publish_users: bool = knob(
        "whether raw user ids, texts about users and times of interactions may be published; they are personal data",
        False,
    )


@dataclass(frozen=True)
class Backbone:
    """The decoder that both towers share."""

    name: str | None = knob("Hub name or local folder of a pretrained causal language model; none: made from `config`")
    gguf_file: str | None = knob("with name: the GGUF file to read there")
    hub_name: str | None = knob(
        "with the name of a folder: what that backbone is called on the Hub, for the model card", said_only=True
    )
    layers: int | None = knob("keep only so many of the lowest layers")
    config: dict[str, Any] = knob(
        "with no name: the backbone's own configuration, model_type included; where it names no hidden size, that is 128, above "
        "2,000 items 256, above 8,000 512",
        {},
    )
    train: Literal["none", "lora", "full"] = knob("which weights of the backbone and of the words learn", "none")
    lora_rank: int = knob("with train lora: rank of the update", 8)
    num_words: int = knob(
        "with no name: size of the byte-level BPE vocabulary that is trained on the training text", 2000
    )
    attention_dropout: float = knob(
        "dropout of the attention's weights in training, whatever the backbone's configuration says; 0 lets torch's fused kernel run",
        0.0,
    )
    attn_implementation: str | None = knob("sdpa, eager, flash_attention_2 …; none: the best that is there")
    dtype: Literal["float32", "bfloat16", "float16"] = knob("dtype of the weights", "float32")


@dataclass(frozen=True)
class TextEncoder:
    """A pretrained model that reads texts for the text map, beside their words (not in the paper)."""

    name: str | None = knob(
        "Hub name or local folder of a pretrained encoder or decoder whose mean state says what a text means, such as "
        "sentence-transformers/all-MiniLM-L6-v2; it is published with the model, in the folder text_encoder; none: words alone"
    )
    gguf_file: str | None = knob("with name: the GGUF file to read there")
    hub_name: str | None = knob(
        "with the name of a folder: what that model is called on the Hub, for the model card", said_only=True
    )
    layers: int | None = knob("keep only so many of the lowest layers")


@dataclass(frozen=True)
class Method:
    """The choices of the method; each that departs from the paper says so."""

    content_tower: bool = knob("whether the content tower has its own user and item embeddings", True)
    lambda_v: float = knob(
        "weight of the mutual regularisation (paper eq. 6 and 8); large: tightly coupled towers", 0.1
    )
    max_history: int = knob("items of the history that a prompt holds; the oldest go first", 512)
    max_text_tokens: int = knob("tokens of a text that a document holds", 128)
    history_order: Literal["shuffled", "chronological"] = knob(
        "order of the items in a document (paper: shuffled every epoch)", "shuffled"
    )
    readout: Literal["last", "mean"] = knob(
        "recommendation prompt is read at its last token (paper), or as the mean over its ID tokens and the last, which each item of "
        "the history is a part of: explanations are clearer, and a backbone of 0 layers reads the history at all",
        "last",
    )
    targets: Literal["held_out", "all", "next"] = knob(
        "the multinomial likelihood is over the held-out items (paper) or the whole history (published code); next: at each item of "
        "the history the one that came next, for histories in order of time (as SASRec learns); the prompt then ends with the history",
        "held_out",
    )
    held_out_share: list[float] = knob(
        "share of the history that is held out of the prompt, uniform between the two", [0.2, 0.6]
    )
    user_token_dropout: float = knob(
        "share of the training prompts without the user token, so that people without one are served; 1: no prompt names a user, and "
        "known ones are served by their history, too",
        0.5,
    )
    item_bias: bool = knob("a learned bias per item in both item heads (not in the paper)", False)
    softmax: Literal["exact", "sampled"] = knob(
        "exact: over all items; sampled: over own targets and `num_negatives` items of the step, for catalogues so large that all "
        "items take too long or too much memory; while training alone",
        "exact",
    )
    num_negatives: int = knob(
        "with softmax sampled: about so many items, half of them the most popular, half drawn", 2048
    )
    initialisation: Literal["random", "ials"] = knob(
        "what the ID embeddings start from: random (paper) or factors of iALS", "random"
    )
    initialisation_std: float = knob("standard deviation of the ID embeddings at the start", 0.05)
    teacher: Literal["ials", "blend"] = knob(
        "the teacher of the distillation: iALS, or iALS blended with a ridge map from the users' texts, with EASE that sees the items' "
        "texts (without texts up to 4,000 items), and with how near an item's topics are to the history's and to one's own text's, as "
        "validation likes it",
        "ials",
    )
    distillation: float = knob(
        "share of the recommendation loss taken from the teacher's softmax, 0: none (paper)", 0.0
    )
    text_map: bool = knob(
        "after training, fit a map from texts to tastes and to items (not in the paper): people and new items are served by a "
        "sentence; needs texts of items or users",
        True,
    )
    user_offsets: bool = knob(
        "when training has ended, add to the states of known users what validation likes of the teacher's scores and of their own texts",
        False,
    )


@dataclass(frozen=True)
class Stage:
    """One training stage: pretraining (both language models) or fine-tuning (the recommendation head)."""

    epochs: int = knob("passes over the corpus; in pretraining an epoch is one over each corpus", 10)
    max_documents: int = knob(
        "no more epochs than read so many documents of a stage's largest corpus, but one at least; 0: as many as `epochs` says. Large "
        "sets need fewer epochs, and overfit in more",
        0,
    )
    batch_size: int = knob("documents per step, over all processes and accumulation steps", 64)
    gradient_accumulation_steps: int = knob("parts in which a process works off its share of a step", 1)
    lr: float = knob("peak learning rate of the ID embeddings and biases", 1e-3)
    backbone_lr: float | None = knob("peak learning rate of backbone and words, where they learn; none: as lr")
    weight_decay: float = knob("decoupled weight decay on the backbone's matrices", 0.0)
    warmup_epochs: float = knob("epochs of linear warm-up", 1.0)
    schedule: Literal["cosine", "constant"] = knob(
        "after the warm-up: cosine down to 5 % of the peak, or constant", "cosine"
    )
    max_grad_norm: float = knob("gradients are clipped to this norm; 0: not", 1.0)
    patience: int = knob("stop after so many epochs without a better validation NDCG@100; 0: never", 0)
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = knob(
        "autocast of forward and backward; auto: bf16 where the processor or GPU has instructions for it", "no"
    )
    gradient_checkpointing: bool = knob("recompute activations in the backward pass, for less memory", False)


@dataclass(frozen=True)
class Evaluation:
    """Ranking of the whole catalogue for every user, and what it is compared with."""

    batch_size: int = knob("prompts ranked at a time", 256)
    top_k: int = knob("items per user that predict.py writes", 100)
    selection_users: int = knob(
        "users that validation NDCG@100 is measured on after an epoch (a seeded sample of them)", 5000
    )
    baselines: list[Literal["popularity", "item_knn", "ease", "ials"]] = knob(
        "baselines fitted on the same split", ["popularity", "item_knn", "ease", "ials"]
    )


@dataclass(frozen=True)
class Recipe:
    """A whole run. `name` is also the name of its folder in `output_dir`."""

    name: str = knob("name of the recipe and of the run's folder", "run")
    output_dir: str = knob("folder that holds the runs", "runs")
    seed: int = knob("every random choice of the run flows from it", 42)
    refit: bool = knob(
        "train on the validation and test pairs too, with what the finished run of the same recipe without it chose; --refit sets it",
        False,
    )
    device: str = knob("auto, cpu, cuda, cuda:1, mps …", "auto")
    tracker: str = knob("a tracker of Accelerate (tensorboard, wandb, …) or none", "tensorboard")
    license: str | None = knob("licence of the trained model, for its card (an identifier of the Hub)")
    language: list[str] = knob("languages of the texts, for the model card (en, de, … or multilingual, code)", [])
    data: Data = field(default_factory=Data, metadata={"help": "the data"})
    backbone: Backbone = field(default_factory=Backbone, metadata={"help": "the backbone"})
    text_encoder: TextEncoder = field(default_factory=TextEncoder, metadata={"help": "the text encoder"})
    method: Method = field(default_factory=Method, metadata={"help": "the method"})
    pretrain: Stage = field(default_factory=Stage, metadata={"help": "stages one and two, in alternating epochs"})
    finetune: Stage = field(default_factory=Stage, metadata={"help": "stage three"})
    evaluation: Evaluation = field(default_factory=Evaluation, metadata={"help": "ranking and baselines"})
