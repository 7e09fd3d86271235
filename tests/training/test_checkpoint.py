"""The shipped checkpoint is what its model card says: size, types, names, and what it answers greedily on the CPU."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from training.chat_format import CHAT_TEMPLATE, SPECIAL_TOKENS, Message, render
from training.llama import Llama, LlamaShape, rotary_tables

FOLDER = Path(__file__).parents[2] / "checkpoints" / "pystdlib-7m"
MAX_BYTES = 25_000_000
END_IDS = (0, 3)
NEVER_SEEN = '''def count_words(path):
    """Return how often each word occurs in the file."""
    counts = {}
    with open(path) as file:
        for line in file:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts
'''


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(LlamaShape())
    model.load_state_dict({name: t.float() for name, t in load_file(FOLDER / "model.safetensors").items()})
    return model.eval()


@torch.inference_mode()
def greedy(model: Llama, ids: list[int], num_tokens: int) -> list[int]:
    """The tokens that follow `ids`, without the token that ends them; recomputes the prompt for each."""
    cos, sin = rotary_tables(LlamaShape(), torch.device("cpu"))
    out: list[int] = []
    for _ in range(num_tokens):
        token = int(model.logits(torch.tensor([ids + out]), cos, sin)[0, -1].argmax())
        if token in END_IDS:
            break
        out.append(token)
    return out


@torch.inference_mode()
def loss(model: Llama, ids: list[int]) -> float:
    """Nats a token."""
    cos, sin = rotary_tables(LlamaShape(), torch.device("cpu"))
    return float(model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), cos, sin))


def test_folder_is_small_enough_to_commit() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_weights_are_bfloat16_with_tied_embeddings() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == 6_951_168


def test_config_is_the_shape_that_was_trained() -> None:
    assert json.loads((FOLDER / "config.json").read_text("utf-8")) == LlamaShape().hf_config()
    generation = json.loads((FOLDER / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == list(END_IDS)


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == LlamaShape().vocab_size
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", [NEVER_SEEN, "naïve — 日本 \U0001f40d\r\n\t\x00 end", "", " "])
def test_every_text_survives_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_served_chat_template_is_the_training_format() -> None:
    config = json.loads((FOLDER / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == CHAT_TEMPLATE
    prompt = render([Message("user", "Hi")], add_generation_prompt=True)
    assert prompt == "<|user|>\nHi<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does random.choice do?", "Choose a random element from a non-empty sequence."),
        ("Which module has OrderedDict?", "`OrderedDict` is in the module `collections`."),
        ("What does len do?", "Return the number of items in a container."),
    ],
)
def test_chat_answers_as_in_the_model_card(model: Llama, tokenizer: Tokenizer, question: str, answer: str) -> None:
    prompt = render([Message("user", question)], add_generation_prompt=True)
    assert tokenizer.decode(greedy(model, tokenizer.encode(prompt).ids, 32)) == answer
    assert f"{question}\n{answer}" in (FOLDER / "README.md").read_text("utf-8")


def test_completion_is_the_one_in_the_model_card(model: Llama, tokenizer: Tokenizer) -> None:
    completion = tokenizer.decode(greedy(model, tokenizer.encode("import os\n\ndef ").ids, 24))
    assert completion.startswith("popen(file, mode=")
    assert f"import os\n\ndef {completion}" in (FOLDER / "README.md").read_text("utf-8")


def test_loss_is_far_below_chance_on_python_it_never_saw(model: Llama, tokenizer: Tokenizer) -> None:
    assert loss(model, tokenizer.encode(NEVER_SEEN).ids) < 3.0  # chance is ln 4096 = 8.3


def test_transformers_loads_the_folder_and_agrees(model: Llama, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer.encode(NEVER_SEEN).ids
    assert their_tokenizer(NEVER_SEEN).input_ids == ids
    with torch.inference_mode():
        logits = theirs(torch.tensor([ids])).logits
        cos, sin = rotary_tables(LlamaShape(), torch.device("cpu"))
        torch.testing.assert_close(model.logits(torch.tensor([ids]), cos, sin), logits, atol=1e-3, rtol=1e-3)
