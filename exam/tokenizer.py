"""The tokenizer: byte pairs, trained once on a task's text. The bytes that a token stands for are those of val_bpb."""

import base64
from pathlib import Path

import numpy as np

from prepare import Trouble

# GPT-4's pre-tokenisation with numbers in groups of at most two digits, which suits small vocabularies (nanochat).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def train_tokenizer(texts, vocab_size):
    """Byte-pair encoding of `texts` with `vocab_size - 1` tokens, as a list of token bytes in rank order (rustbpe)."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
    tokens = [bytes(token) for token, _ in sorted(tokenizer.get_mergeable_ranks(), key=lambda item: item[1])]
    if len(tokens) != vocab_size - 1:
        raise Trouble(f"the text is too small for a vocabulary of {vocab_size} tokens (it gave {len(tokens) + 1})")
    return tokens


def build_encoding(tokens):
    """tiktoken Encoding of the token bytes, with BOS as the last token."""
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|bos|>": len(tokens)}
    )


def load_tokens(folder):
    """Token bytes in rank order, as `prepare` wrote them: one base64 token a line."""
    return [base64.b64decode(line) for line in (Path(folder) / "tokenizer.txt").read_bytes().splitlines()]


def token_bytes(tokens):
    """UTF-8 bytes that each token stands for, int64 [vocab_size]; BOS stands for none."""
    return np.array([len(token) for token in tokens] + [0], dtype=np.int64)
