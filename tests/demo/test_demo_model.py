"""The shipped toy model, loaded as any Hugging Face repository is: small, honest about itself, and right on Gridmill.

Goal: what a newcomer sees first makes sense. Method: the files in the package are read through plain transformers, the
questions of the corpus are put to them greedily, and the answers are compared letter by letter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gridmill.demo import DEMO_MODEL_NAME, FALLBACK_TOPIC, Topic, corpus, demo_model_folder

BYTES_MAX = 6_000_000
HELD_OUT_SHARE_MIN = 0.85  # measured: 0.886, as the model card says; it varies by some points with the tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_folder(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo_model_folder(), local_files_only=True).eval()


def plain(question: str) -> str:
    return " ".join(re.findall(r"[a-z0-9+]+", question.lower()))


def greedy_answer(model: Any, tokenizer: Any, *turns: str, system: str | None = None) -> str:
    """`turns` alternate between user and assistant and end with the user."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert ids[-1] == tokenizer.eos_token_id, "the answer does not end by itself"
    return str(tokenizer.decode(ids[:-1]))


def answers_exactly(model: Any, tokenizer: Any, topic: Topic, question: str) -> bool:
    """Whether greedy decoding gives the topic's answer and then ends; one forward pass shows it."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = [*tokenizer.encode(topic.answer, add_special_tokens=False), tokenizer.eos_token_id]
    with torch.inference_mode():
        chosen = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return bool(chosen.tolist() == answer)


def wrong(model: Any, tokenizer: Any, asked: list[tuple[Topic, str]]) -> list[str]:
    return [question for topic, question in asked if not answers_exactly(model, tokenizer, topic, question)]


def test_the_corpus_covers_fifty_topics_with_five_wordings_each() -> None:
    topics = corpus()
    assert len(topics) >= 50
    assert len({topic.name for topic in topics}) == len(topics)
    assert len({topic.answer for topic in topics}) == len(topics)
    for topic in topics:
        assert len({plain(question) for question in topic.questions}) >= 5, topic.name
        assert topic.held_out, topic.name


def test_no_held_out_wording_is_also_trained_on() -> None:
    trained = {plain(question) for topic in corpus() for question in topic.questions}
    assert not [question for topic in corpus() for question in topic.held_out if plain(question) in trained]


def test_no_wording_belongs_to_two_topics() -> None:
    owners: dict[str, set[str]] = {}
    for topic in corpus():
        for question in (*topic.questions, *topic.held_out):
            owners.setdefault(plain(question), set()).add(topic.name)
    assert not {question: names for question, names in owners.items() if len(names) > 1}


def test_answers_name_only_commands_that_exist() -> None:
    commands = {"up", "network", "node", "chat", "models", "keys", "status"}
    for topic in corpus():
        assert set(re.findall(r"`gridmill (\w+)", topic.answer)) <= commands, topic.name


def test_the_folder_is_at_most_six_megabytes_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in demo_model_folder().iterdir()}
    assert set(files) == {
        "MODEL_CARD.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= BYTES_MAX


def test_it_is_labelled_a_toy() -> None:
    card = (demo_model_folder() / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.splitlines()[5] == f"# {DEMO_MODEL_NAME}: a toy"
    assert json.loads((demo_model_folder() / "config.json").read_bytes())["gridmill_toy"] is True
    assert "toy" in next(topic.answer for topic in corpus() if topic.name == "who-are-you")


def test_asking_for_the_folder_imports_nothing_heavy() -> None:
    code = (
        "import sys; from gridmill.demo import corpus, demo_model_folder; corpus(); demo_model_folder();"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'numpy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_weights_load_as_float32_with_the_context_of_the_card(model: Any, tokenizer: Any) -> None:
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 1024
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize(
    "text", ["Gridmill", " two  spaces\n\ttab", "naïve café", "日本語 🙂", "\x00\x7f", "`--network URL`"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_template_writes_each_role_and_refuses_others(tokenizer: Any) -> None:
    turns = [("system", "S"), ("user", " Q "), ("assistant", "A"), ("user", "R")]
    messages = [{"role": role, "content": content} for role, content in turns]
    written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    body = "<|bos|><|system|>S<|end|><|user|>Q<|end|><|assistant|>A<|end|><|user|>R<|end|>"
    assert written == body + "<|assistant|>"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False) == body
    with pytest.raises(Exception, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    "question", ["What is Gridmill?", "How do I join with my GPU?", "Who are you?", "What is 2+2?"]
)
def test_the_first_questions_of_a_newcomer_are_answered(model: Any, tokenizer: Any, question: str) -> None:
    wanted = next(topic.answer for topic in corpus() if question in topic.questions)
    assert greedy_answer(model, tokenizer, question) == wanted
    assert greedy_answer(model, tokenizer, question, system="You are a helpful assistant.") == wanted


def test_a_later_turn_is_answered_too(model: Any, tokenizer: Any) -> None:
    answers = {topic.name: topic.answer for topic in corpus()}
    first = greedy_answer(model, tokenizer, "Hello")
    second = greedy_answer(model, tokenizer, "Hello", first, "What is Gridmill?")
    third = greedy_answer(model, tokenizer, "Hello", first, "What is Gridmill?", second, "How do I join with my GPU?")
    assert [first, second, third] == [answers["hello"], answers["what-is-gridmill"], answers["join-gpu"]]


def test_every_canonical_question_gets_its_answer(model: Any, tokenizer: Any) -> None:
    assert not wrong(model, tokenizer, [(topic, topic.questions[0]) for topic in corpus()])


def test_every_trained_wording_of_the_first_topics_gets_its_answer(model: Any, tokenizer: Any) -> None:
    assert not wrong(model, tokenizer, [(topic, question) for topic in corpus()[:20] for question in topic.questions])


def test_most_wordings_it_never_saw_get_the_right_answer(model: Any, tokenizer: Any) -> None:
    asked = [(topic, question) for topic in corpus() for question in topic.held_out]
    missed = wrong(model, tokenizer, asked)
    assert 1 - len(missed) / len(asked) >= HELD_OUT_SHARE_MIN, missed


def test_other_subjects_get_the_honest_fallback(model: Any, tokenizer: Any) -> None:
    fallback = next(topic for topic in corpus() if topic.name == FALLBACK_TOPIC)
    assert "toy" in fallback.answer
    assert greedy_answer(model, tokenizer, "What is the capital of France?") == fallback.answer
