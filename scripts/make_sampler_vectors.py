"""Writes tests/vectors/sampler-v1.json: what the canonical sampler must answer, for anybody's implementation.

Made by the plain-Python oracle alone (tests/node/native/sampler_oracle.py), never by the engine. Logits are not stored
but rebuilt from a SHA-256 recipe. A case is left out when its answer hangs on a rounding that the page leaves open: the
order of a float32 sum near the top-p or min-p limit, or a lead smaller than the last bits of the noise.

    python scripts/make_sampler_vectors.py            # about a minute; writes the file
    python scripts/make_sampler_vectors.py --check    # the same, compares instead
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "node" / "native"))

import sampler_oracle as oracle  # noqa: E402

PATH = ROOT / "tests" / "vectors" / "sampler-v1.json"
EOS_IDS, STOP_IDS = (2, 5), (7,)
PROMPT = [1, 17, 17, 42, 255, 3]  # small ids, so that one prompt serves both vocabularies

KNOWN_ANSWERS = [  # Random123 kat_vectors: philox 4x32, 10 rounds; counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

ONE_STEP_EACH: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.7},
    "hot": {"temperature": 1.9},
    "barely not greedy": {"temperature": 0.00001},
    "greedy": {"temperature": 0.0},
    "greedy by rounding": {"temperature": 0.0000099},
    "bias": {"logit_bias": {3: 6.5, 17: -100.0, 90: 7.25, 299: 5.125}},
    "repetition": {"repetition_penalty": 1.3},
    "repetition wanted": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "presence and frequency": {"presence_penalty": -0.4, "frequency_penalty": 1.1},
    "minimum length": {"min_tokens": 4, "eos_ids": EOS_IDS, "stop_token_ids": STOP_IDS, "logit_bias": {5: 30.0}},
    "ignore end": {"ignore_eos": True, "eos_ids": EOS_IDS, "logit_bias": {2: 30.0, 5: 30.0}},
    "grammar": {"allowed_modulus": (7, 3)},
    "top-k 1": {"top_k": 1},
    "top-k 40": {"top_k": 40},
    "top-p 0.9": {"top_p": 0.9},
    "top-p 0.3": {"top_p": 0.3},
    "min-p 0.05": {"min_p": 0.05},
}
ALL_TOGETHER: dict[str, dict[str, Any]] = {
    "k and p": {"top_k": 60, "top_p": 0.8},
    "k, p and m": {"top_k": 60, "top_p": 0.95, "min_p": 0.02, "temperature": 1.4},
    "everything": {
        "temperature": 0.85,
        "top_k": 100,
        "top_p": 0.92,
        "min_p": 0.01,
        "repetition_penalty": 1.15,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.25,
        "logit_bias": {5: 30.0, 42: 4.0, 250: -3.5},
        "min_tokens": 3,
        "eos_ids": EOS_IDS,
        "stop_token_ids": STOP_IDS,
        "allowed_modulus": (5, 4),
    },
    "everything, greedy": {
        "temperature": 0.0,
        "repetition_penalty": 1.15,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.25,
        "logit_bias": {5: 30.0, 42: 4.0},
        "ignore_eos": True,
        "eos_ids": EOS_IDS,
    },
}
# name: deviation of the logits is 148 / 2**shift; coarse ones are full of exact ties
SHAPES = {"flat": (7, False), "peaked": (4, False), "coarse": (6, True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    arguments = parser.parse_args()
    text = rendered(document())
    if arguments.check:
        same = PATH.read_text() == text
        print("same" if same else f"{PATH} differs")
        return 0 if same else 1
    PATH.write_text(text)
    print(f"{PATH}: {len(text)} bytes")
    return 0


def document() -> dict[str, Any]:
    cases, left_out = [], 0
    for vocab_size, steps, seeds in ((300, 6, 3), (150_000, 2, 1)):
        for case in plans(vocab_size, steps, seeds):
            solved = solve(case)
            cases += [solved] if solved else []
            left_out += not solved
    return {
        "sampler": "gridmill canonical sampler, version 1",
        "recipe": " ".join((oracle.recipe_logits.__doc__ or "").split()),
        "steps": "step i of a case uses label/i as label; its answer is appended to the output ids",
        "left_out_as_ambiguous": left_out,
        "philox4x32_10": [{"counter": c, "key": k, "output": o} for c, k, o in KNOWN_ANSWERS],
        "gumbel": gumbel_rows(),
        "cases": cases,
    }


def plans(vocab_size: int, steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    for shape, (shift, coarse) in SHAPES.items():
        for name, parameters in (ONE_STEP_EACH | ALL_TOGETHER).items():
            for number in range(seeds):
                label = f"{vocab_size} {shape} {name} {number}"
                yield {
                    "label": label,
                    "vocab_size": vocab_size,
                    "shift": shift,
                    "coarse": coarse,
                    "seed": hashlib.sha256(label.encode()).hexdigest(),
                    "prompt_ids": PROMPT,
                    "delivered_ids": [17, 8, 17][:number],
                    "parameters": parameters,
                    "steps": steps,
                }


def solve(case: dict[str, Any]) -> dict[str, Any] | None:
    parameters = oracle.Parameters(seed=bytes.fromhex(case["seed"]), **case["parameters"])
    output = list(case["delivered_ids"])
    for step in range(case["steps"]):
        logits = oracle.recipe_logits(f"{case['label']}/{step}", case["vocab_size"], case["shift"], case["coarse"])
        answer = oracle.choose(logits, case["prompt_ids"], output, parameters)
        if not answer.sturdy:
            return None
        output.append(answer.token_id)
    solved = {key: value for key, value in case.items() if key != "steps"}
    return solved | {"ids": output[len(case["delivered_ids"]) :]}


def gumbel_rows() -> list[dict[str, Any]]:
    """Noise as the hexadecimal bits of the float32, most significant first."""
    rows = []
    for number in range(4):
        seed = hashlib.sha256(f"noise {number}".encode()).digest()
        for position in (0, 1, 31, 4095, 2**20 + 3):
            noise = oracle.Noise(seed, position)
            ids = [0, 1, 2, 3, 4, 299, 1023, 31_999, 149_999, 2**22 - 1]
            bits = [struct.pack(">f", noise.of(v)).hex() for v in ids]
            rows.append({"seed": seed.hex(), "position": position, "ids": ids, "g": bits})
    return rows


def rendered(value: dict[str, Any]) -> str:
    """One case a line, so that a changed vector shows as one changed line."""
    lines = []
    for key, part in value.items():
        if isinstance(part, list):
            body = ",\n".join("  " + json.dumps(row) for row in part)
            lines.append(f" {json.dumps(key)}: [\n{body}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(part)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
