"""The text map, and a catalogue that changes without training, on the model itself."""

import copy
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from modeling_cllm4rec import CLLM4RecConfig, CLLM4RecForRecommendation
from modeling_cllm4rec.text_cllm4rec import (
    TEXTS_PER_PASS,
    TextMap,
    item_text,
    number_of,
    terms_of,
    words_of,
)
from modeling_cllm4rec.text_encoder_cllm4rec import TextEncoder

WORDS, USERS, ITEMS, WIDTH = 50, 5, 7, 6
PROMPT = {"history": [10, 11], "separator": [12], "recommend": [13, 14]}


TERMS = ["stars", "stars*", "web", "web*", "tables", "web stars"]
NUMBERS = sorted(map(number_of, TERMS))


def text_map(width=4, seed=0):
    made = TextMap(len(NUMBERS), width)
    torch.manual_seed(seed)
    for name, value in made.state_dict().items():
        value.copy_(torch.tensor(NUMBERS) if name == "terms" else torch.randn_like(value) * 0.3)
    made.rarity.abs_().add_(0.1)
    return made


@pytest.fixture
def model(backbone_config):
    torch.manual_seed(1)
    config = CLLM4RecConfig(
        backbone_config=backbone_config, num_users=USERS, num_items=ITEMS, prompt_ids=PROMPT, num_text_terms=len(TERMS),
        initializer_range=0.5,
    )  # fmt: skip
    made = CLLM4RecForRecommendation(config).eval()
    made.model.text_map.load_state_dict(text_map(width=config.hidden_size).state_dict())
    return made


@pytest.fixture
def without_texts(backbone_config):
    config = CLLM4RecConfig(backbone_config=backbone_config, num_users=USERS, num_items=ITEMS, prompt_ids=PROMPT)
    return CLLM4RecForRecommendation(config).eval()


def logits(model, histories, users=None, texts=None):
    return model.item_logits(model.query_states(histories, users, texts))


def test_words_their_prefixes_and_pairs_of_neighbours_are_counted():
    words = words_of("Star-catalogues, of 2 ÜBER-stars")
    assert words == ["star", "catalogues", "of", "über", "stars"]
    terms = dict(terms_of(words[:3]))
    expected = {"star": (0,), "star*": (0,), "catalogues": (1,), "catal*": (1,), "of": (2,), "of*": (2,)}
    expected |= {"star catalogues": (0, 1), "catalogues of": (1, 2)}
    assert terms == {number_of(term): places for term, places in expected.items()}
    assert number_of("stars") == 18726956
    assert terms_of([]) == []


@pytest.mark.parametrize(
    ("raw", "title", "text", "expected"),
    [
        ("a1", "Stars", "all of them", "Stars. all of them"),
        ("a1", "Stars", "", "Stars"),
        ("a1", "Stars", "Stars of the web", "Stars of the web"),
        ("a1", "a1", "all of them", "all of them"),
        (7, "7", "", ""),
        (7, None, "all of them", "all of them"),
        (7, None, None, ""),
    ],
)
def test_an_items_title_and_text_are_read_as_in_training(raw, title, text, expected):
    assert item_text(raw, title, text) == expected


def test_terms_count_by_tf_idf_and_all_others_are_passed_over():
    made = text_map()
    bag = made.bag(["Stars! web, stars", "", "of nothing"])
    counts = {"stars": 2, "stars*": 2, "web": 1, "web*": 1, "web stars": 1}
    expected = torch.zeros(len(TERMS))
    for term, count in counts.items():
        place = NUMBERS.index(number_of(term))
        expected[place] = torch.tensor(float(count)).log1p() * made.rarity[place]
    torch.testing.assert_close(bag[0], expected / expected.norm())
    assert not bag[1:].any()


def test_texts_are_read_in_passes_to_the_same_rows():
    made = text_map()
    texts = ["stars web"[: 5 + 4 * (number % 2)] for number in range(TEXTS_PER_PASS + 3)]
    said, nobody = made.states(texts)
    torch.testing.assert_close(said[-1], made.states(texts[-1:])[0][0])
    torch.testing.assert_close(said[0] + nobody, made.to_state(made.bag(["stars"]))[0])
    rows, biases = made.item_rows(texts)
    torch.testing.assert_close(torch.cat([rows[-1], biases[-1:]]), made.to_item(made.bag(texts[-1:]))[0])


def test_effects_of_words_add_up_to_the_logit():
    made, state, text = text_map(), torch.randn(4), "Web stars of stars"
    effects = made.word_effects(text, state)
    rows, biases = made.item_rows([text])
    alone = made.to_item.bias[:-1] @ state + made.to_item.bias[-1]
    assert sum(effects.values()) == pytest.approx((rows[0] @ state + biases[0] - alone).item(), abs=1e-5)
    assert list(effects) == ["web", "stars", "of"]
    assert effects["of"] == 0 != effects["web"]


def test_a_text_speaks_alone_or_beside_a_history(model):
    made, text = model.model.text_map, "web stars"
    said, nobody = made.states([text])
    states = model.query_states([[], [1, 2], [], [1, 2]], [None, None, 3, None], [text, text, text, None])
    plain = model.query_states([[], [1, 2], []], [None, None, 3])
    torch.testing.assert_close(states[0], (nobody + said[0]))
    torch.testing.assert_close(states[1], plain[1] + made.weight_beside_history * said[0])
    torch.testing.assert_close(states[2], plain[2] + made.weight_beside_history * said[0])
    torch.testing.assert_close(states[3], plain[1])
    torch.testing.assert_close(model.query_states(texts=[text])[0], states[0])


def test_a_user_without_history_whom_prompts_do_not_name_is_known_by_the_offset_alone(model):
    model.config.prompt_names_user = False
    made, text = model.model.text_map, "web stars"
    said, nobody = made.states([text])
    torch.testing.assert_close(model.query_states([[]], [3], [text])[0], nobody + said[0])
    effects = model.history_effects([2], [0], user=3)
    alone = logits(model, [[2], []]).log_softmax(-1)[:, 0]
    torch.testing.assert_close(effects[0, 0], alone[0] - alone[1])
    model.config.user_offsets = True
    model.model.user_offsets = torch.nn.Embedding(USERS, model.config.hidden_size)
    offset, nothing = model.model.user_offsets.weight[3], model.query_states([[]])[0]
    torch.testing.assert_close(model.query_states([[]], [3])[0], nothing + offset)
    with_text = nothing + offset + made.weight_beside_history * said[0]
    torch.testing.assert_close(model.query_states([[]], [3], [text])[0], with_text)


def test_texts_change_a_ranking_and_scores_stay_probabilities(model):
    ranked = model.recommend(texts=["stars", "web"], k=ITEMS)
    torch.testing.assert_close(ranked.scores.sum(-1), torch.ones(2))
    assert not torch.equal(ranked.items[0], ranked.items[1])


def test_a_model_without_texts_says_so(without_texts):
    assert without_texts.model.text_map is None
    with pytest.raises(ValueError, match="trained without texts"):
        without_texts.recommend(texts=["stars"])
    with pytest.raises(ValueError, match="trained without texts"):
        without_texts.add_items(["stars"])


def test_there_is_a_text_for_each_person(model):
    with pytest.raises(ValueError, match="1 texts but 2 people"):
        model.recommend([[1], [2]], texts=["stars"])


def test_excluded_items_are_not_shown_whatever_else_is_asked(model):
    best = model.recommend([[0]], k=2).items[0].tolist()
    without = model.recommend([[0]], k=ITEMS, exclude=best[:1]).items[0].tolist()
    assert without[0] == best[1]
    assert best[0] not in without
    assert model.recommend([[0]], k=3, candidates=best, exclude=best[:1]).items[0].tolist() == [best[1], -1, -1]
    with pytest.raises(IndexError, match="exclude hold an item outside"):
        model.recommend([[0]], exclude=[ITEMS])


def test_the_map_is_saved_with_the_model_and_does_not_learn(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, [[1]], None, ["web stars"]), logits(model, [[1]], None, ["web stars"]))
    assert not any(p.requires_grad for p in again.model.text_map.parameters())
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.model.text_map.terms.tolist() == NUMBERS
    assert half.recommend([[1]], texts=["web"], k=1).items.shape == (1, 1)


@pytest.mark.parametrize("content_tower", [True, False])
def test_new_items_leave_the_old_ones_as_they_are(model, backbone_config, content_tower, tmp_path):
    if not content_tower:
        changed = copy.deepcopy(model.config)
        changed.content_tower = False
        other = CLLM4RecForRecommendation(changed).eval()
        other.load_state_dict(model.state_dict(), strict=False)
        model = other
    before = logits(model, [[0, 1], [4]], [2, None])
    row, bias = model.model.text_map.item_rows(["web stars"])
    assert model.add_items(["web stars", "tables"]) == range(ITEMS, ITEMS + 2)
    after = logits(model, [[0, 1], [4]], [2, None])
    torch.testing.assert_close(after[:, :ITEMS], before)
    torch.testing.assert_close(model.model.item_embeddings.weight[ITEMS], row[0])
    torch.testing.assert_close(model.model.item_bias[ITEMS], bias[0])
    assert model.config.vocab_size == WORDS + USERS + ITEMS + 2
    assert model.get_output_embeddings().out_features == 9
    assert model.get_output_embeddings().weight is model.model.item_embeddings.weight
    assert model.recommend([[ITEMS + 1]], candidates=[ITEMS], k=1).items.item() == ITEMS
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, [[ITEMS]]), logits(model, [[ITEMS]]))


def test_new_items_can_be_trained_on(model):
    model.add_items(["web stars"])
    model.train()
    ids = torch.tensor([[WORDS + USERS + ITEMS, 10, 12, 13]])
    model(ids, labels=torch.tensor([[ITEMS, 0]])).loss.backward()
    assert model.model.item_embeddings.weight.grad[ITEMS].any()
    assert all(p.grad is None for p in model.model.text_map.parameters())


def test_new_users_move_the_item_tokens_and_no_score(model):
    before = logits(model, [[0, 1], [4]], [2, None])
    assert model.add_users(3) == range(USERS, USERS + 3)
    torch.testing.assert_close(logits(model, [[0, 1], [4]], [2, None]), before)
    torch.testing.assert_close(
        model.model.user_embeddings.weight[-1], model.model.user_embeddings.weight[:USERS].mean(0)
    )
    assert model.model.content_user_embeddings.num_embeddings == USERS + 3
    with pytest.raises(ValueError, match="-1 users cannot"):
        model.add_users(-1)


def test_removed_items_are_gone_and_the_others_keep_order_and_scores(model):
    before = logits(model, [[0, 6]])
    moved = model.remove_items([2, 5])
    assert moved.tolist() == [0, 1, -1, 2, 3, -1, 4]
    after = logits(model, [[0, 4]])
    torch.testing.assert_close(after, before[:, [0, 1, 3, 4, 6]])
    assert model.config.num_items == 5 == len(model.model.content_item_embeddings.weight)
    with pytest.raises(IndexError, match="item 5 is outside"):
        model.remove_items([5])
    with pytest.raises(ValueError, match="all items"):
        model.remove_items(range(5))
    assert model.config.num_items == 5


def test_forgotten_users_leave_nothing_in_the_tables(model):
    before = [table.weight.clone() for table in (model.model.user_embeddings, model.model.content_user_embeddings)]
    model.remove_users([1, 4])
    for table, old in zip((model.model.user_embeddings, model.model.content_user_embeddings), before, strict=True):
        assert torch.equal(table.weight[[0, 2, 3]], old[[0, 2, 3]])
        torch.testing.assert_close(table.weight[4], old[[0, 2, 3]].mean(0))
        assert torch.equal(table.weight[1], table.weight[4])
    with pytest.raises(IndexError, match="user 5 is outside"):
        model.remove_users([USERS])


@pytest.mark.parametrize("tokens_at_a_time", [2**14, 4])
def test_effects_are_what_the_likelihood_loses_without_an_item(model, monkeypatch, tokens_at_a_time):
    monkeypatch.setattr("modeling_cllm4rec.ranking_cllm4rec.TOKENS_AT_A_TIME", tokens_at_a_time)
    effects = model.history_effects([1, 2, 5], [0, 3], user=4, text="web")
    whole = logits(model, [[1, 2, 5]], [4], ["web"]).log_softmax(-1)[0, 3]
    without = logits(model, [[1, 5]], [4], ["web"]).log_softmax(-1)[0, 3]
    torch.testing.assert_close(effects[1, 1], whole - without)
    assert effects.shape == (2, 3)


def test_items_that_a_prompt_has_no_room_for_have_no_effect(model):
    model.config.max_history = 2
    effects = model.history_effects([1, 2, 5], [3])[0]
    assert effects[0] == 0
    assert effects[1:].all()
    with pytest.raises(IndexError, match="item 7"):
        model.history_effects([1], [ITEMS])


def test_the_offsets_of_known_users_are_added(model, tmp_path):
    plain = model.query_states([[1], [1], [1]], [2, None, 3])
    model.config.user_offsets = True
    with_texts = CLLM4RecForRecommendation(model.config).eval()
    with_texts.load_state_dict(model.state_dict(), strict=False)
    table = with_texts.model.user_offsets
    assert not table.weight.requires_grad
    states = with_texts.query_states([[1], [1], [1]], [2, None, 3], [None, None, "web"])
    torch.testing.assert_close(states[0], plain[0] + table.weight[2])
    torch.testing.assert_close(states[1], plain[1])
    torch.testing.assert_close(with_texts.query_states([[1]], [None]), plain[1:2])
    torch.testing.assert_close(states[2], model.query_states([[1]], [3], ["web"])[0] + table.weight[3])
    with_texts.add_users(2)
    assert table.weight.shape[0] == USERS + 2
    assert not table.weight[USERS:].any()
    with_texts.remove_users([2])
    assert not table.weight[2].any()
    assert table.weight[3].any()
    with_texts.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again.query_states([[1]], [3]), with_texts.query_states([[1]], [3]))


@pytest.fixture
def reading(model):
    """The model with a map that reads states, too."""
    config = copy.deepcopy(model.config)
    config.text_state_width = WIDTH
    torch.manual_seed(2)
    made = CLLM4RecForRecommendation(config).eval()
    known = {name: value for name, value in model.state_dict().items() if "text_map.to_" not in name}
    made.load_state_dict(known, strict=False)
    map = made.model.text_map
    with torch.no_grad():
        for parameter in (map.to_state.weight, map.to_item.weight, map.state_mean):
            parameter.normal_(std=0.3)
        map.state_spread[1] = 2.0
    assert map.to_state.weight.shape == (config.hidden_size, len(TERMS) + WIDTH)
    made.text_encoder = word_encoder()
    return made


def test_states_of_texts_are_read_beside_their_terms(reading):
    made = reading.model.text_map
    pooled = reading.text_encoder(["3 4", "8"])
    unlike = (pooled - made.state_mean[1]) / 2.0
    inputs = torch.cat([made.bag(["3 4", "8"]), unlike / unlike.norm(dim=1, keepdim=True)], 1)
    rows, biases = made.item_rows(["3 4", "8"], pooled)
    torch.testing.assert_close(torch.cat([rows, biases[:, None]], 1), made.to_item(inputs))
    new = reading.add_items(["3 4", "8"])
    torch.testing.assert_close(reading.model.item_embeddings.weight[list(new)], rows)
    said, nobody = made.states(["3 4"], pooled[:1])
    torch.testing.assert_close(reading.query_states(texts=["3 4"])[0], said[0] + nobody)
    with_nothing = reading.query_states(texts=[""])[0]
    torch.testing.assert_close(with_nothing, nobody)
    assert not torch.allclose(said, torch.zeros_like(said))


def test_a_text_is_read_once_for_an_explanation(reading):
    asked, read = [], reading.text_encoder
    reading.text_encoder = Asked(read, asked)
    reading.history_effects([1, 2, 3], [4], text="3 4")
    assert asked
    assert all(set(texts) == {"3 4"} for texts in asked)


class Asked:
    """An encoder that remembers what it was asked."""

    def __init__(self, encoder, asked):
        self.encoder, self.model, self.asked = encoder, encoder.model, asked

    def __call__(self, texts):
        self.asked.append(texts)
        return self.encoder(texts)


def test_effects_of_words_leave_states_out(reading):
    state, made = torch.randn(reading.config.hidden_size), reading.model.text_map
    effects = made.word_effects("web stars", state)
    words = made.bag(["web stars"])[0] @ made.to_item.weight[:, : len(TERMS)].T
    assert sum(effects.values()) == pytest.approx((words[:-1] @ state + words[-1]).item(), abs=1e-5)


def test_the_encoder_goes_into_a_folder_beside_the_weights(reading, tmp_path):
    expected = reading.query_states(texts=["3 4"])
    reading.save_pretrained(tmp_path / "whole" / "inside")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "inside").eval()
    assert again.text_encoder is None  # until a text comes
    torch.testing.assert_close(again.query_states(texts=["3 4"]), expected)
    under = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", subfolder="inside").eval()
    torch.testing.assert_close(under.query_states(texts=["3 4"]), expected)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "inside", dtype=torch.bfloat16)
    assert half.model.text_map.state_mean.dtype == half.model.text_map.state_spread.dtype == torch.float32
    assert half.eval().recommend(texts=["3 4"], k=1).items.shape == (1, 1)
    base = AutoModel.from_pretrained(tmp_path / "whole" / "inside")
    base.save_pretrained(tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "base" / "text_encoder").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_without_its_encoder_a_model_says_so(reading, tmp_path):
    reading.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "text_encoder")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    said = r"none can be opened in the folder text_encoder of .*; set model.text_encoder"
    with pytest.raises(ValueError, match=said):
        again.recommend(texts=["3 4"])
    with pytest.raises(ValueError, match=said):
        again.save_pretrained(tmp_path / "copy")
    again.recommend([[1]], k=1)
    again.text_encoder = reading.text_encoder
    torch.testing.assert_close(again.query_states(texts=["3 4"]), reading.query_states(texts=["3 4"]))


def word_encoder():
    torch.manual_seed(3)
    words = Tokenizer(WordLevel({str(number): number for number in range(WORDS)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    config = GPT2Config(vocab_size=WORDS, n_embd=WIDTH, n_head=2, n_layer=1)
    return TextEncoder(GPT2Model(config).to(torch.bfloat16).float(), PreTrainedTokenizerFast(tokenizer_object=words))
