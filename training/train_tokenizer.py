"""Trains the byte-level BPE tokenizer on the training shards and encodes every shard to an array of ids.

Run after build_corpus: python -m training.train_tokenizer --corpus build/corpus --out checkpoints/pystdlib-7m
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.chat_format import CHAT_TEMPLATE, END_OF_TEXT, SPECIAL_TOKENS

SHARDS = ("code_train", "code_validation", "chat_train", "chat_validation")


def read_shard(path: Path) -> list[str]:
    """The documents of one shard."""
    with path.open(encoding="utf-8") as file:
        return [str(json.loads(line)) for line in file]


def train(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text has an encoding and every encoding decodes to the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """uint16 [num_tokens]: the documents one after another, each ended by END_OF_TEXT."""
    ids: list[int] = []
    end = SPECIAL_TOKENS.index(END_OF_TEXT)
    for encoding in tokenizer.encode_batch(list(documents)):
        ids.extend(encoding.ids)
        ids.append(end)
    return np.array(ids, dtype=np.uint16)


def write_config(out: Path, context_tokens: int) -> None:
    """tokenizer_config.json as Hugging Face's AutoTokenizer and Baton's router read it."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/pystdlib-7m"))
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    shards = {name: read_shard(arguments.corpus / f"{name}.jsonl") for name in SHARDS}
    training_text = (text for name, texts in shards.items() if name.endswith("_train") for text in texts)
    tokenizer = train(training_text, arguments.vocab_size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    write_config(arguments.out, context_tokens=4096)
    for name, texts in shards.items():
        ids = encode(tokenizer, texts)
        np.save(arguments.corpus / f"{name}.npy", ids, allow_pickle=False)
        num_bytes = sum(len(text.encode()) for text in texts)
        print(f"{name}: {len(ids)} tokens, {num_bytes / len(ids):.2f} bytes a token")


if __name__ == "__main__":
    main()
