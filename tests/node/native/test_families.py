"""The admission test must let good families in, and must be able to find every fault it looks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES
from transformers import AutoConfig

from gridmill.node.engines.native.families import admission_test, twin_config
from gridmill.node.engines.native.pool import Pool
from gridmill.node.engines.native.runner import Runner

QUICK = ("llama", "deepseek_v3")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.soak) for name in FAMILIES]


@pytest.mark.parametrize("family", ALL)
def test_a_family_as_it_is_published_is_admitted(family: str) -> None:
    """With transformers' own defaults, which are the sizes of a real member of the family."""
    findings = admission_test(AutoConfig.for_model(family))
    assert (findings.faithful, findings.batches, findings.cuts, findings.exact) == (True,) * 4, findings.details
    assert not findings.details


def test_a_twin_keeps_every_kind_of_layer_and_the_sharing_of_heads() -> None:
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=34)
    twin = twin_config(config)
    assert set(twin.layer_types) == set(config.layer_types) and twin.num_hidden_layers == 6
    assert twin.sliding_window == 8
    deepseek = twin_config(AutoConfig.for_model("deepseek_v3", num_hidden_layers=61, first_k_dense_replace=3))
    assert 0 < deepseek.first_k_dense_replace < 6
    grouped = twin_config(AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (4, 2)


def test_layers_without_plain_attention_are_not_admitted() -> None:
    findings = admission_test(
        AutoConfig.for_model("lfm2", layer_types=["conv", "full_attention"] * 8, num_hidden_layers=16)
    )
    assert not (findings.faithful or findings.batches or findings.cuts or findings.exact)
    assert "plain attention" in findings.details[0]


def test_a_config_that_cannot_be_shrunk_is_not_admitted() -> None:
    findings = admission_test(AutoConfig.for_model("gpt2"))
    assert not findings.faithful and "no twin of gpt2" in findings.details[0]


def test_a_forgotten_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Pool.attend
    monkeypatch.setattr(Pool, "attend", lambda self, *a, **k: attend(self, *a, **{**k, "window": None}))
    findings = admission_test(AutoConfig.for_model("mistral"))
    assert not findings.faithful and "plain transformers" in findings.details[0]


def test_rows_that_see_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Pool.attend

    def leaky(self: Pool, *tensors: Any, **options: Any) -> torch.Tensor:
        out = attend(self, *tensors, **options)
        assert self.plan is not None
        return out + 0.01 * out.mean() if len(self.plan.spans) > 1 else out

    monkeypatch.setattr(Pool, "attend", leaky)
    findings = admission_test(AutoConfig.for_model("llama"))
    assert findings.faithful and not findings.batches and not findings.exact


def test_a_stage_that_repeats_the_start_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite scales embeddings inside its forward, which a later stage must not do again."""
    monkeypatch.setattr(Runner, "_hand_over", lambda self, module, args, kwargs: (args, kwargs))
    findings = admission_test(AutoConfig.for_model("granite", embedding_multiplier=12.0), exact=False)
    assert findings.faithful and findings.batches and not findings.cuts
