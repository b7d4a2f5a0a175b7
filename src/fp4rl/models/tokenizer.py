"""The embedded model's tokenizer: a word of the arithmetic task is one token, any other text is one a character.

A blank belongs to the token after it (` has`, ` 2`), so that decoding concatenates and restores every text: `2 5` and
`25` stay different. About 140 tokens; a character outside printable ASCII becomes the one in ASCII that looks most like
it, or `<unk>`.
"""

import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = ("\n", *map(chr, range(ord(" "), ord("~") + 1)))
SPACED = tuple("0123456789+-=.?")
# In a folder with a Qwen2 model AutoTokenizer uses Qwen2Tokenizer, whatever class the folder names, and silently splits
# texts differently. An `auto_map` makes it keep to the named class; no remote code is looked for.
NO_OTHER_CLASS = {"AutoTokenizer": [None, "fp4rl--PreTrainedTokenizerFast"]}
# The arithmetic task's words; a test keeps the two in step.
WORDS = (
    *("Q:", "A:", "has", "more", "How", "many", "####"),
    *("Tom", "Ann", "Sam", "Mia", "Ben", "Eva"),
    *("coins", "apples", "books", "cards", "pens", "shells"),
    *("buys", "finds", "gets", "wins", "loses", "sells", "eats", "drops"),
)
# Characters that occur in grade-school texts; without these each would be `<unk>`.
LOOKS = {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "−": "-", "×": "*", "÷": "/", "\u2028": "\n"}
LOOKS |= {"⁄": "/", "€": "$", "£": "$", "¢": "c", "√": "sqrt", "\u200b": "", "\t": " ", "\r": ""}


def build_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Build the tokenizer with one token for each of `words` after a blank, the first of them also at a line's start.

    Nothing is read from disk. Padding is on the left, as generation needs it; no token is added to a text.
    """
    pieces = [*CHARACTERS, *(f" {mark}" for mark in SPACED), words[0], *(f" {word}" for word in words)]
    vocabulary = {piece: index for index, piece in enumerate([PAD, BOS, EOS, UNK, *dict.fromkeys(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = _ascii_looks()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_pattern(words)), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,  # it would turn " ." into "." and so change the text
        auto_map=NO_OTHER_CLASS,
    )


def _pattern(words: Sequence[str]) -> str:
    longest_first = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    marks = "".join(map(re.escape, SPACED))
    return rf" (?:{longest_first})(?![A-Za-z0-9#])|^{re.escape(words[0])}| [{marks}]|[\s\S]"


def _ascii_looks() -> normalizers.Normalizer:
    looks = [normalizers.Replace(mark, look) for mark, look in LOOKS.items()]
    return normalizers.Sequence([*looks, normalizers.NFKD(), normalizers.StripAccents(), *looks])
