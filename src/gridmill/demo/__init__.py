"""`gridmill/demo`: a toy model that ships inside the package, so that the first answer needs no download.

The model folder is an ordinary Hugging Face repository and loads through the same path as any other. Nothing here
imports torch, transformers or tokenizers: asking where the model lies must stay cheap.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DEMO_MODEL_NAME = "gridmill/demo"
FALLBACK_TOPIC = "fallback"  # the answer to every question that no topic covers

_HERE = Path(__file__).resolve().parent


def demo_model_folder() -> Path:
    """The folder with config.json, model.safetensors, tokenizer.json and the rest. It is read-only by intent."""
    return _HERE / "model"


@dataclass(frozen=True)
class Topic:
    """One thing the toy model was trained to say.

    `questions[0]` is the canonical wording. `held_out` wordings are never trained on; they measure generalisation.
    Training puts `subjects`, `tasks` and `features` into frames: "tell me about …", "how do I …", "is … supported".
    """

    name: str
    answer: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    subjects: tuple[str, ...]
    tasks: tuple[str, ...]
    features: tuple[str, ...]


@cache
def corpus() -> tuple[Topic, ...]:
    """All topics in file order, the fallback last."""
    tables = tomllib.loads((_HERE / "corpus.toml").read_text(encoding="utf-8"))["topic"]
    return tuple(
        Topic(
            name=table["name"],
            answer=table["answer"],
            questions=tuple(table["questions"]),
            held_out=tuple(table["held_out"]),
            subjects=tuple(table.get("subjects", ())),
            tasks=tuple(table.get("tasks", ())),
            features=tuple(table.get("features", ())),
        )
        for table in tables
    )
