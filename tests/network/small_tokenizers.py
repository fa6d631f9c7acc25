"""Small tokenizers of the kinds that public models use, built in memory, and what a worker says of them."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gridmill.network.detokenise import ClassText
from gridmill.network.text import class_text
from gridmill.network.text_worker import LoadedClass, describe
from gridmill.wire.classes import TextFacts, facts_bytes

CORPUS = [
    "Gridmill pools GPUs that belong to different owners into one inference service.",
    "The quick brown fox jumps over the lazy dog. It's a fine day, isn't it? Yes, it's (mostly) fine.",
    "def push(self, token_id: int) -> str:\n    return self._texts[token_id]  # the hot path\n\n\n",
    "naïve café, Ærøskøbing, “quotes” — dashes … Привет, мир. こんにちは世界。 안녕하세요 🙂🙂",
    "system user assistant tool Hello hello there there   spaces    many 0123456789 3.14159",
] * 3
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "[/INST]"]


@functools.cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes written as printable characters, a control token that is no special one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens(["<think>", AddedToken("</think>", normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


@functools.cache
def llama2_like() -> Tokenizer:
    """As Llama 2: ▁ for space, bytes as <0xNN>, one space taken off the front of what is decoded."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = _metaspaced()
    trained.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=260, special_tokens=[]))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token in model["vocab"] if token not in names]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(merge) for merge in model["merges"]],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = _metaspaced()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@functools.cache
def gemma_like() -> Tokenizer:
    """As Llama 2 without the strip: a leading space is kept."""
    tokenizer = Tokenizer.from_str(llama2_like().to_str())
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    """As T5 and older SentencePiece conversions: the first token loses its ▁, whatever it is."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    )
    return tokenizer


@functools.cache
def wordpiece() -> Tokenizer:
    """As BERT: words are joined by spaces, ## continues one. Only decoding in context can tell what an id prints."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"]))
    return tokenizer


@functools.cache
def without_decoder() -> Tokenizer:
    """No decoder at all: tokens joined by spaces."""
    words = sorted({word for line in CORPUS for word in line.split()})
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: i + 1 for i, word in enumerate(words)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def suffix_bpe() -> Tokenizer:
    """As the first GPT: a word's last piece says so, and the decoder treats the last token of the text differently."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>"))
    return tokenizer


def collapsing() -> Tokenizer:
    """A decoder that says repeated tokens once, as for speech."""
    tokenizer = Tokenizer.from_str(without_decoder().to_str())
    tokenizer.decoder = decoders.CTC(pad_token="[UNK]", word_delimiter_token="|", cleanup=False)
    return tokenizer


def hidden_bytes() -> Tokenizer:
    """Byte level behind another step, so that only whole texts decode well: no table by id can be right."""
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("zz"), "z")])
    return tokenizer


STREAMABLE = (byte_level, llama2_like, gemma_like, metaspace, wordpiece, without_decoder)
UNSTREAMABLE = (suffix_bpe, collapsing, hidden_bytes)


def facts_for(tokenizer: Tokenizer, chat_template: str | None = None, padding_ids: int = 5) -> TextFacts:
    """`padding_ids`: embeddings are often a little larger than the vocabulary."""
    return TextFacts(
        chat_template=chat_template,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        eos_token_ids=(1,),
        context_tokens=4096,
        vocab_size=tokenizer.get_vocab_size() + padding_ids,
    )


def text_of(tokenizer: Tokenizer) -> ClassText:
    """By the worker's own road, without the process."""
    content, facts = tokenizer.to_str().encode(), facts_for(tokenizer)
    return class_text(facts, describe(LoadedClass(content, facts_bytes(facts)), content))


def _metaspaced() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
