"""The script that makes the toy model: it repeats itself, keeps held-out wordings out, and speaks the shipped template.

Goal: whoever runs the script gets what the package ships. Method: its parts are run on the real corpus for a few steps.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gridmill.demo import corpus, demo_model_folder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_demo_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(script: ModuleType) -> Any:
    return script.train_tokenizer(corpus())


def test_the_shipped_tokenizer_is_what_the_script_makes_of_the_corpus(tokenizer: Any) -> None:
    assert tokenizer.to_str(pretty=True) == (demo_model_folder() / "tokenizer.json").read_text(encoding="utf-8")


def test_training_chats_are_written_as_the_shipped_template_writes_them(script: ModuleType, tokenizer: Any) -> None:
    shipped = AutoTokenizer.from_pretrained(demo_model_folder(), local_files_only=True)
    maker = script.ChatMaker(tokenizer, corpus(), random.Random(5))
    maker._split_oddly = maker._encode  # odd splits are wanted in training, but no template would write them
    roles = {"<|user|>": "user", "<|assistant|>": "assistant", "<|system|>": "system"}
    answers = {topic.answer for topic in corpus()}
    turns = 0
    for ids, is_answer in (maker.chat() for _ in range(400)):
        text = shipped.decode(ids)
        if not text.endswith("<|end|>"):
            continue  # the last answer is cut on purpose
        parts = text.removeprefix("<|bos|>").split("<|end|>")[:-1]
        if not text.startswith(tuple("<|bos|>" + mark for mark in roles)):
            continue  # an answer as plain text
        messages = [
            {"role": roles[mark], "content": part.removeprefix(mark)}
            for part in parts
            for mark in roles
            if part.startswith(mark)
        ]
        if any(message["role"] == "assistant" and message["content"] not in answers for message in messages):
            continue  # an answer cut short inside a word is other tokens when its text is encoded anew
        assert shipped.apply_chat_template(messages, return_dict=False) == ids
        told = shipped.decode([token for token, wanted in zip(ids, is_answer, strict=True) if wanted])
        assert set(told.split("<|end|>")) <= {*answers, ""}
        turns += len(messages)
    assert turns > 400


def test_held_out_wordings_are_never_trained_on(script: ModuleType, tokenizer: Any) -> None:
    held_out = {script.plain(question) for topic in corpus() for question in topic.held_out}
    maker = script.ChatMaker(tokenizer, corpus(), random.Random(6))
    asked = [maker._question(topic) for topic in corpus() for _ in range(300)]
    assert not [question for question in asked if script.plain(question) in held_out]


def test_the_same_seed_gives_the_same_weights(script: ModuleType, tokenizer: Any) -> None:
    def weights_after_two_steps() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        model = script.new_model(tokenizer)
        assert script.train(model, tokenizer, corpus(), seed=7, steps=2, seconds_max=600)
        return dict(model.state_dict())

    one, other = weights_after_two_steps(), weights_after_two_steps()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_time_limit_ends_training_and_is_reported(script: ModuleType, tokenizer: Any) -> None:
    torch.manual_seed(7)
    assert not script.train(script.new_model(tokenizer), tokenizer, corpus(), seed=7, steps=2, seconds_max=-1.0)
