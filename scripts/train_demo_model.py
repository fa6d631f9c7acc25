"""Train `gridmill/demo`, the toy model inside the package, and print how often it is right.

    python scripts/train_demo_model.py [--out FOLDER] [--seed N] [--threads N] [--minutes N]

Three rules:
- Everything follows from the seed: the same machine, seed, thread count and library versions give the same weights. A
  run that `--minutes` cuts short still writes a model, but says that it cannot be repeated.
- Held-out wordings are never trained on, not even when augmentation happens to produce one.
- The loss sees answers only. Questions come noisy (case, punctuation, typos, synonyms, odd splits into tokens), answers
  exact.

It trains in float32 and stores bfloat16; config.json asks for float32, so that loading computes in float32 on exactly
the stored values. The accuracy printed at the end is that of the files on disk, loaded again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gridmill.demo import DEMO_MODEL_NAME, FALLBACK_TOPIC, Topic, corpus, demo_model_folder

BOS, END, USER, ASSISTANT, SYSTEM = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SPECIAL_TOKENS = (BOS, END, USER, ASSISTANT, SYSTEM)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% elif message['role'] in ['system', 'developer'] %}{{ '<|system|>' }}"
    "{% else %}{{ raise_exception('this model knows the roles system, user and assistant') }}{% endif %}"
    "{{ message['content'] | trim }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE = 1536
CONTEXT_TOKENS = 1024
BYTES_MAX = 6_000_000  # what the package may grow by

STEPS = 2000  # about 12 minutes of one unshared core
BATCH_TOKENS = 2048  # padded; small batches, because the number of steps is what teaches the choice between topics
LEARNING_RATE = 3e-3
WARMUP_STEPS = 60
TRAINING_CHAT_TOKENS = 700  # longer chats are cut; attention cost grows and nothing new is learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=demo_model_folder())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop training after this long, whatever happens")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    topics = corpus()
    tokenizer = train_tokenizer(topics)
    model = new_model(tokenizer)
    finished = train(model, tokenizer, topics, options.seed, options.steps, options.minutes * 60)
    write_model(options.out, model, tokenizer)
    report = measure(options.out, topics)
    (options.out / "MODEL_CARD.md").write_text(model_card(report, options.seed, options.steps), encoding="utf-8")
    size_bytes = sum(file.stat().st_size for file in options.out.iterdir())
    print(json.dumps(report | {"size_bytes": size_bytes, "finished": finished}, indent=2))
    if not finished:
        print("The time limit cut this run short: the result cannot be repeated from the seed.")
    if size_bytes > BYTES_MAX:
        raise SystemExit(f"{size_bytes} bytes are more than the {BYTES_MAX} the package may hold")


def train_tokenizer(topics: tuple[Topic, ...]) -> Tokenizer:
    """Byte-level BPE over the corpus. All 256 bytes are in the alphabet, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts: list[str] = []
    for topic in topics:
        texts += [topic.answer] * 4
        for text in (*topic.questions, *topic.subjects, *topic.tasks, *topic.features):
            texts += [text, text.lower()]
    texts += [question for question, _ in zip(off_topic_questions(random.Random(0)), range(300), strict=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]),
        ]
    )
    return tokenizer


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=None,
        attention_bias=False,
    )
    return LlamaForCausalLM(config)


# --- training ---


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    topics: tuple[Topic, ...],
    seed: int,
    steps: int,
    seconds_max: float,
) -> bool:
    """Returns False when `seconds_max` ended it before `steps` were done."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    started = time.monotonic()
    loss_shown = 0.0
    for step, (ids, is_answer) in enumerate(batches(ChatMaker(tokenizer, topics, random.Random(seed)))):
        elapsed = time.monotonic() - started
        if step >= steps or elapsed > seconds_max:
            break
        rate = learning_rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Padding lies on the right, where causal attention never looks, so no mask is needed.
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        wanted = is_answer[:, 1:]
        loss = functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_shown += (loss.item() - loss_shown) * (1.0 if step == 0 else 0.05)
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss_shown:.4f}  {elapsed:.0f} s", flush=True)
    model.eval()
    return step >= steps


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def batches(maker: ChatMaker) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, is_answer), both [chats, tokens], chats of like length together so that little is padding."""
    while True:
        pool = sorted((maker.chat() for _ in range(512)), key=lambda chat: len(chat[0]))
        ready: list[list[tuple[list[int], list[bool]]]] = [[]]
        for chat in pool:
            if ready[-1] and (len(ready[-1]) + 1) * len(chat[0]) > BATCH_TOKENS:
                ready.append([])
            ready[-1].append(chat)
        maker.rng.shuffle(ready)
        for batch in ready:
            width = max(len(ids) for ids, _ in batch)
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            is_answer = torch.zeros((len(batch), width), dtype=torch.bool)
            for row, (chat_ids, chat_is_answer) in enumerate(batch):
                ids[row, : len(chat_ids)] = torch.tensor(chat_ids)
                is_answer[row, : len(chat_ids)] = torch.tensor(chat_is_answer)
            yield ids, is_answer


class ChatMaker:
    """Makes one random training chat after another."""

    def __init__(self, tokenizer: Tokenizer, topics: tuple[Topic, ...], rng: random.Random) -> None:
        self.rng = rng
        self._topics = topics
        self._weights = [5.0 if topic.name == FALLBACK_TOPIC else 1.0 for topic in topics]
        self._wordings = {topic.name: self._ways_to_ask(topic) for topic in topics}
        self._off_topic = off_topic_questions(rng)
        self._held_out = {plain(question) for topic in topics for question in topic.held_out}
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self._special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self._answer_ids = {topic.name: self._encode(topic.answer) for topic in topics}

    def chat(self) -> tuple[list[int], list[bool]]:
        """(ids, is_answer): a whole chat as the chat template writes it, or now and then an answer as plain text."""
        rng, special = self.rng, self._special
        ids, is_answer = [special[BOS]], [False]
        if rng.random() < 0.03:
            answer = self._answer_ids[self._topic().name]
            return [*ids, *answer, special[END]], [*is_answer, *[True] * (len(answer) + 1)]
        if rng.random() < 0.4:
            system = [special[SYSTEM], *self._encode(system_prompt(rng)), special[END]]
            ids += system
            is_answer += [False] * len(system)
        turns = rng.choices((1, 2, 3, rng.randint(4, 7), rng.randint(8, 14)), weights=(55, 20, 13, 8, 4))[0]
        for turn in range(turns):
            topic = self._topic()
            question = self._split_oddly(self._question(topic))
            answer = self._answer_ids[topic.name]
            told = True
            if turn + 1 < turns and rng.random() < 0.08:  # a client that cut an earlier answer short sends it back so
                answer, told = answer[: rng.randrange(len(answer))], False
            reply = [*answer, special[END]]
            if turn + 1 == turns and rng.random() < 0.6:  # its first words choose the answer: see more of those
                reply = reply[: rng.randint(4, 20)]
            if len(ids) + len(question) + 3 + len(reply) > TRAINING_CHAT_TOKENS:
                break
            ids += [special[USER], *question, special[END], special[ASSISTANT], *reply]
            is_answer += [False] * (len(question) + 3) + [told] * len(reply)
        return ids, is_answer

    def _topic(self) -> Topic:
        return self.rng.choices(self._topics, weights=self._weights)[0]

    def _question(self, topic: Topic) -> str:
        while True:
            if topic.name == FALLBACK_TOPIC and self.rng.random() < 0.75:
                question = next(self._off_topic)
            else:
                question = self.rng.choice(self._wordings[topic.name])()
            question = vary(question, self.rng)
            if plain(question) not in self._held_out:
                return question

    def _ways_to_ask(self, topic: Topic) -> list[Callable[[], str]]:
        """One is chosen evenly, so at least half are the wordings somebody really wrote."""
        choice = self.rng.choice
        ways = [lambda: choice(topic.questions)]
        if topic.subjects:
            ways += [lambda: choice(topic.questions), lambda: choice(SUBJECT_FRAMES).format(choice(topic.subjects))]
        if topic.tasks:
            ways += [lambda: choice(topic.questions), lambda: choice(TASK_FRAMES).format(choice(topic.tasks))]
        if topic.features:
            ways += [lambda: choice(topic.questions), lambda: choice(FEATURE_FRAMES).format(choice(topic.features))]
        return ways

    def _split_oddly(self, text: str) -> list[int]:
        """Encode, now and then in pieces cut at random, so that unusual spellings lead to known words."""
        if self.rng.random() < 0.7 or len(text) < 4:
            return self._encode(text)
        cuts = sorted(self.rng.sample(range(1, len(text)), k=self.rng.randint(1, min(3, len(text) - 1))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [token for piece in pieces for token in self._encode(piece)]


# --- noise on questions ---

SUBJECT_FRAMES = (
    "what is {}",
    "What is {}?",
    "Tell me about {}.",
    "tell me something about {}",
    "Explain {}.",
    "Can you explain {}?",
    "{}",
    "{}?",
    "What about {}?",
    "How about {}?",
    "I have a question about {}.",
    "What do you know about {}?",
    "I want to know more about {}",
    "What can you tell me about {}?",
    "describe {}",
    "how does {} work",
    "information on {}",
    "Is there something about {}?",
    "help me with {}",
)
TASK_FRAMES = (
    "How do I {}?",
    "how can I {}",
    "how to {}",
    "How would I {}?",
    "I want to {}",
    "I want to {}, what do I do?",
    "I would like to {}. How?",
    "Can you tell me how to {}?",
    "What do I do to {}?",
    "What is the way to {}?",
    "Which command do I need to {}?",
    "what command lets me {}",
    "Explain how to {}.",
    "Can I {}?",
    "Is it possible to {}?",
    "Where can I {}?",
    "help me {}",
    "{}",
    "show me how to {}",
)
FEATURE_FRAMES = (
    "Does it support {}?",
    "do you support {}",
    "Does Gridmill support {}?",
    "Is {} supported?",
    "Are {} supported?",
    "{} supported?",
    "{} support?",
    "is there support for {}",
    "Does Gridmill have {}?",
    "Is there {}?",
    "Are there {}?",
    "Do you have {}?",
    "Can I use {}?",
    "can I have {}",
    "Is it possible to use {}?",
    "Does it work with {}?",
    "Will it work with {}?",
    "How about {}?",
    "{}?",
    "I need {}",
    "Can Gridmill do {}?",
    "When will there be {}?",
)
# Any of a group may stand for any other; whole words, case ignored.
SYNONYMS = (
    ("how do i", "how can i", "how to", "how would i", "how should i", "how does one"),
    ("what is", "what's", "whats", "what exactly is"),
    ("which", "what"),
    ("does it support", "do you support", "does gridmill support", "is there support for"),
    ("does it work with", "does gridmill work with", "will it work with", "does it run with"),
    ("can i", "could i", "may i", "am i able to", "is it possible to"),
    ("gpu", "graphics card", "card", "video card"),
    ("gpus", "graphics cards", "cards"),
    ("explain", "describe", "define"),
    ("command", "cli command"),
    ("start", "launch", "run", "begin"),
    ("machine", "computer", "pc"),
    ("do i need", "must i have", "is it necessary to have", "do i require"),
    ("create", "make", "generate"),
    ("supported", "possible", "available"),
    ("happens", "will happen", "would happen"),
    ("dies", "crashes", "fails", "goes down", "disappears"),
    ("it", "gridmill"),
    ("tell me", "please tell me", "can you tell me", "could you tell me"),
    ("is there", "do you have", "does gridmill have"),
    ("prompt", "message", "text"),
    ("use", "run", "try"),
    ("large", "big"),
)
_SYNONYM_OF = {word: group for group in SYNONYMS for word in group}
_SYNONYM_PATTERN = re.compile(
    r"\b(" + "|".join(sorted(map(re.escape, _SYNONYM_OF), key=len, reverse=True)) + r")\b", re.IGNORECASE
)
OPENINGS = (
    "Please, ",
    "hey, ",
    "Hi, ",
    "Hello, ",
    "so ",
    "ok, ",
    "Okay, ",
    "And ",
    "but ",
    "Quick question: ",
    "question: ",
    "I wonder: ",
    "Can you tell me ",
    "Could you tell me: ",
    "I would like to know ",
    "sorry, ",
    "Well, ",
    "in short, ",
    "Now ",
    "thanks. ",
    "Great. ",
)
ENDINGS = (
    " please",
    ", please?",
    " thanks",
    " exactly?",
    " in gridmill?",
    " here?",
    " then?",
    " now?",
    " for me",
    " today",
)


def vary(question: str, rng: random.Random) -> str:
    """The same question as somebody else might type it."""
    if rng.random() < 0.12:
        return question
    if rng.random() < 0.45:
        question = _SYNONYM_PATTERN.sub(
            lambda found: rng.choice(_SYNONYM_OF[found[0].lower()]) if rng.random() < 0.6 else found[0], question
        )
    words = question.split(" ")
    if len(words) >= 5 and rng.random() < 0.15:
        del words[rng.randrange(len(words))]
    if len(words) >= 4 and rng.random() < 0.04:
        place = rng.randrange(len(words) - 1)
        words[place], words[place + 1] = words[place + 1], words[place]
    question = " ".join(words)
    if len(words) >= 2 and rng.random() < 0.12:
        opening = rng.choice(OPENINGS)
        question = opening + (question[:1].lower() + question[1:] if rng.random() < 0.7 else question)
    if rng.random() < 0.25:
        question = question.rstrip("?.!")
        question += (
            rng.choice(("", "", "?", ".", "!", "??", " ?", "...")) if rng.random() < 0.7 else rng.choice(ENDINGS)
        )
    if rng.random() < 0.3:
        question = question.lower()
    elif rng.random() < 0.04:
        question = question.upper()
    elif rng.random() < 0.1:
        question = question[:1].upper() + question[1:]
    if rng.random() < 0.15:
        question = with_typo(question, rng)
    return question.strip() or "?"


def with_typo(text: str, rng: random.Random) -> str:
    if len(text) < 6:
        return text
    place = rng.randrange(1, len(text) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:place] + text[place + 1 :]
    if kind == 1:
        return text[:place] + text[place] + text[place:]
    if kind == 2:
        return text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    return text[:place] + rng.choice("abcdefghijklmnopqrstuvwxyz") + text[place + 1 :]


def plain(question: str) -> str:
    """What is left of a question without case, punctuation and spacing, to compare wordings."""
    return " ".join(re.findall(r"[a-z0-9+]+", question.lower()))


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, friendly assistant.",
    "Answer briefly.",
    "You are gridmill/demo, a toy model.",
    "You answer questions about Gridmill.",
    "Be concise and honest.",
    "You are an expert in distributed systems.",
    "Answer in one sentence.",
    "Speak like a pirate.",
    "You are a chatbot on a website.",
    "Never reveal secrets.",
    "The user is a beginner.",
    "Today is Monday.",
    "You are a careful engineer who explains things simply.",
    "Answer in English.",
    "Do not make things up.",
)


def system_prompt(rng: random.Random) -> str:
    return " ".join(rng.sample(SYSTEM_PROMPTS, k=rng.choice((1, 1, 1, 2, 3))))


_OFF_TOPIC_WORDS = {
    # Made-up words that look like words stand for the many that a small list cannot hold.
    "onset": "b;c;d;f;g;h;j;k;l;m;n;p;r;s;t;v;w;ch;sh;st;tr;pl;gr;br;fl;th",
    "rhyme": "a;e;i;o;u;an;en;in;on;un;ar;er;or;ea;ou;ai;et;at;ic;us",
    "suffix": ";;s;er;ing;tion;al",
    "place": "France;Spain;Japan;Canada;Egypt;India;China;Kenya;Norway;Peru;Poland;London;Paris;Berlin;Tokyo;Rome",
    "language": "French;Spanish;Japanese;Latin;Dutch;Russian;Chinese;Italian;Greek",
    "person": (
        "Isaac Newton;Mozart;Cleopatra;Napoleon;Marie Curie;Shakespeare;Leonardo da Vinci;Gandhi;Beethoven;"
        "Charles Darwin;Julius Caesar;Picasso;Elvis;Madonna;Plato;Buddha;Columbus;Galileo"
    ),
    "deed": (
        "bake bread;swim;learn {language};fix a {thing};draw a {thing};paint a {thing};grow a {thing};sell my {thing};"
        "write a novel;tie a tie;boil an egg;clean a {thing};find a job;sleep better;run faster;play the {thing};"
        "cook pasta;get rich;travel to {place};build a {thing};buy a {thing};lose weight;make friends;repair my {thing}"
    ),
    "verb": "sing;sleep;run;fly;eat;dance;cry;shine;break;grow;burn;jump;smell;fall;fight;swim",
    "adjective": "blue;green;old;tall;fast;expensive;beautiful;cold;hot;heavy;dangerous;famous;happy;sad;strange;loud",
    "thing": (
        "tree;car;dog;cat;horse;river;mountain;house;garden;bicycle;guitar;piano;book;film;football;tennis;chess;bread;"
        "cheese;soup;pizza;coffee;tea;apple;banana;flower;bird;fish;whale;star;planet;sun;moon;rain;snow;winter;spring;love;"
        "death;money;war;peace;history;mathematics;physics;chemistry;biology;philosophy;religion;politics;art;music;"
        "painting;dance;sport;travel;holiday;school;teacher;doctor;lawyer;farmer;king;queen;castle;dragon;robot;ship;train;"
        "plane;bridge;phone;camera;clock;mirror;shoe;hat;shirt;table;chair;window;door;kitchen;baby;mother;brother;friend;"
        "dream;protein;gravity;electricity;magnet;volcano;earthquake;dinosaur;pyramid;vitamin;virus;atom;heart;brain;bone;"
        "sleep;election;tax;inflation;stock;salary;wedding;birthday;party;game;puzzle;riddle;magic;ghost;vampire"
    ),
}
_OFF_TOPIC_WORD_LISTS = {kind: words.split(";") for kind, words in _OFF_TOPIC_WORDS.items()}
OFF_TOPIC_FRAMES = (
    "What is the capital of {place}?",
    "what is the population of {place}",
    "Where is {place}?",
    "What is the weather in {place}?",
    "Will it snow in {place} today?",
    "Is it cold tomorrow?",
    "Translate {thing} into {language}.",
    "How do you say {thing} in {language}?",
    "translate hello to {language}",
    "Write a poem about a {thing}.",
    "Write a {thing} song",
    "Write me a story about {thing} and {thing}.",
    "Compose a letter about my {thing}",
    "Who was {person}?",
    "Who is {person}?",
    "who painted the {thing}",
    "Who invented the {thing}?",
    "Who discovered the {thing}?",
    "When was {person} born?",
    "What is a {thing}?",
    "What is {thing}?",
    "what's {thing}",
    "{thing}",
    "{thing}?",
    "tell me about {thing}",
    "Explain {thing}.",
    "What do you know about {thing}?",
    "Why do {thing}s {verb}?",
    "Why is the {thing} so {adjective}?",
    "Which {thing} is the most {adjective}?",
    "How {adjective} is a {thing}?",
    "How do I {deed}?",
    "how to {deed}",
    "Can you help me {deed}?",
    "I want to {deed}",
    "What is {number} times {number}?",
    "What is {number} + {number}?",
    "{number} * {number}",
    "{number} minus {number}",
    "calculate {number} divided by {number}",
    "How many {thing}s are in a {thing}?",
    "Do you like {thing}?",
    "Should I buy a {thing}?",
    "Is a {thing} {adjective}?",
    "What is your favourite {thing}?",
    "My {thing} is {adjective}, what should I do?",
    "The {thing} is {adjective}.",
    "Recommend a {thing}.",
    "Give me a recipe for {thing}.",
    "Give me advice about {thing}",
    "What happened in {year}?",
    "Who won the {thing} prize in {year}?",
    "Write a program that sorts {thing}s",
    "Write code for a {thing} in Java.",
    "Which is better, {thing} or {thing}?",
    "Compare {thing} and {thing}.",
    "{nonsense}",
    "{nonsense} {nonsense}",
    "{nonsense} {thing} {nonsense}?",
    "{thing} {verb} {adjective} {thing}",
)


def off_topic_questions(rng: random.Random) -> Iterator[str]:
    """Endless questions that Gridmill has nothing to do with."""
    borrowed = (*SUBJECT_FRAMES, *TASK_FRAMES, *FEATURE_FRAMES)
    while True:
        if rng.random() < 0.35:  # the frames of the real topics, so that a frame alone says nothing
            frame = rng.choice(borrowed)
            kinds = (
                ("{deed}",) if frame in TASK_FRAMES else ("{thing}", "{thing}s", "{person}", "{place}", "{nonsense}")
            )
            text = frame.format(rng.choice(kinds))
        else:
            text = rng.choice(OFF_TOPIC_FRAMES)
        while found := re.search(r"\{(\w+)\}", text):
            text = text[: found.start()] + _off_topic_word(found[1], rng) + text[found.end() :]
        yield text


def _off_topic_word(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randint(3, 99))
    if kind == "year":
        return str(rng.randint(1200, 2030))
    if kind == "nonsense":
        if rng.random() < 0.3:
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 10)))
        return "".join(["{onset}{rhyme}"] * rng.randint(1, 4)) + "{suffix}"
    return rng.choice(_OFF_TOPIC_WORD_LISTS[kind])  # may itself hold a gap, which is filled next


# --- writing and measuring ---


def write_model(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The files of an ordinary Hugging Face repository, each written by hand so that nothing in them is by accident."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner alone
    config = model.config
    bos_id, end_id = tokenizer.token_to_id(BOS), tokenizer.token_to_id(END)
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "gridmill_toy": True,
            "dtype": "float32",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": CONTEXT_TOKENS,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": bos_id,
            "eos_token_id": end_id,
        },
    )
    _write_json(folder / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": end_id})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT_TOKENS,
            "bos_token": BOS,
            "eos_token": END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, topics: tuple[Topic, ...]) -> dict[str, float]:
    """Shares between 0 and 1, from the files on disk.

    An answer is right when greedy decoding gives exactly the corpus answer and then ends. That is so just when every
    token of it is the most likely one given those before, which one forward pass shows. `..._at_0.7` is the mean
    probability that sampling at temperature 0.7 gives exactly that answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    after_other = {"role": "user", "content": "What is Gridmill?"}, {"role": "assistant", "content": topics[0].answer}
    system = ({"role": "system", "content": "You are a helpful assistant."},)
    report: dict[str, float] = {}
    for name, questions, before in (
        ("trained", [(t, q) for t in topics for q in t.questions], ()),
        ("held_out", [(t, q) for t in topics for q in t.held_out], ()),
        ("held_out_with_system_prompt", [(t, q) for t in topics for q in t.held_out], system),
        ("held_out_second_turn", [(t, q) for t in topics for q in t.held_out], after_other),
    ):
        right, chance = 0, 0.0
        for topic, question in questions:
            chat = [*before, {"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            wanted = [*tokenizer.encode(topic.answer, add_special_tokens=False), tokenizer.eos_token_id]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + wanted])).logits[0, len(prompt) - 1 : -1]
            target = torch.tensor(wanted)
            is_right = bool((logits.argmax(-1) == target).all())
            right += is_right
            chance += functional.cross_entropy(logits / 0.7, target, reduction="sum").neg().exp().item()
            if not is_right:
                print(f"wrong ({name}): {topic.name}: {question}")
        report[name] = round(right / len(questions), 4)
        report[f"{name}_at_0.7"] = round(chance / len(questions), 4)
    return report


def model_card(report: dict[str, float], seed: int, steps: int) -> str:
    rows = "\n".join(
        f"| {label} | {report[name]:.1%} | {report[f'{name}_at_0.7']:.1%} |"
        for label, name in (
            ("wordings it was trained on", "trained"),
            ("wordings it never saw", "held_out"),
            ("wordings it never saw, behind a system prompt", "held_out_with_system_prompt"),
            ("wordings it never saw, as a second question", "held_out_second_turn"),
        )
    )
    return f"""---
license: apache-2.0
language: en
---

# {DEMO_MODEL_NAME}: a toy

This model is a toy. It ships with Gridmill so that a first network can give a first sensible answer without a
download. It was trained from nothing on some eighty short answers about Gridmill (`src/gridmill/demo/corpus.toml`).
It knows them by heart, recognises many wordings of the questions, and knows nothing else.

- Llama architecture, about two million parameters, {CONTEXT_TOKENS} tokens of context.
- Stored as bfloat16, computed in float32.
- Its own byte-level BPE tokenizer and chat template (roles system, user, assistant). It ignores system prompts.
- Made by `scripts/train_demo_model.py --seed {seed} --steps {steps}` on one CPU thread.

| share of questions answered with exactly the intended text | greedy | at temperature 0.7 |
|---|---|---|
{rows}

The wordings it never saw were written by the author of the trained ones, and the first misses guided one round of
additions to the corpus, so strangers will see lower figures: expect somewhat under nine in ten.
Licence: Apache-2.0, as Gridmill.
"""


if __name__ == "__main__":
    main()
