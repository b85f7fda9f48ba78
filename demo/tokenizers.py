"""The demo model's tokenizers, learned from its captions and robust to unknown words.

Every byte is a token, both inside and at the end of a word. Otherwise CLIP's tokenizer would turn
an unknown word into `<|endoftext|>` in the middle of the prompt. CLIP pools at this token, so the
rest of the prompt would be lost.
"""

from __future__ import annotations

import json
import math
from collections import Counter

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

END = "</w>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer(captions: list[str], length: int) -> CLIPTokenizer:
    """Train a byte-level BPE tokenizer like CLIP's, with at most `length` tokens per prompt."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=END))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1000,
            initial_alphabet=alphabet,
            end_of_word_suffix=END,
            show_progress=False,
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + END for letter in alphabet), *("".join(m) for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """Make a unigram tokenizer: frequent words are whole, all others are spelled letter by letter.

    Letters that are neither ASCII nor in the captions become `<unk>` here. The CLIP tokenizers
    spell them in bytes, so such prompts still differ from each other.
    """
    counts = Counter(word for text in captions for word in text.replace(",", " ,").split())
    total = sum(counts.values())
    letters = dict.fromkeys([*map(chr, range(33, 127)), *"".join(counts)])
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(letter, -12.0) for letter in letters]
    pieces += [("▁" + word, math.log(n / total)) for word, n in counts.most_common(800)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
