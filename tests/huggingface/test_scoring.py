"""The loss of models of transformers in chunks of positions, against their own."""

from __future__ import annotations

import pytest
import torch
from huggingface.sharding_runs import Run, make_model

from lightning_fastmoe.errors import ConfigError
from lightning_fastmoe.huggingface import causal_lm_loss
from lightning_fastmoe.inference import offload_experts

IDS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)


@pytest.mark.parametrize("rows", [1, 7, 36, 99])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_the_models_own_loss(name: str, rows: int) -> None:
    model = make_model(Run(name)).double().eval()
    with torch.inference_mode():
        for labels, mask in ((LABELS, MASK), (IDS, None)):
            right = model(IDS, attention_mask=mask, labels=labels, use_cache=False).loss
            found = causal_lm_loss(model, labels, rows=rows, input_ids=IDS, attention_mask=mask)
            torch.testing.assert_close(found.double(), right.double(), rtol=2e-6, atol=0)
    assert "forward" not in vars(model.base_model)


def test_logits_are_the_models_own() -> None:
    """Granite's are scaled, which the head by itself doesn't know."""
    import transformers

    torch.manual_seed(3)
    config = transformers.GraniteMoeConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        logits_scaling=0.125,
        initializer_range=0.2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        right = model(IDS, labels=IDS).loss
    torch.testing.assert_close(causal_lm_loss(model, IDS, input_ids=IDS, rows=5), right)


def test_with_chunks_of_sequences() -> None:
    model = make_model(Run("qwen3_moe")).double().eval()
    with torch.inference_mode():
        right = model(IDS, labels=IDS, use_cache=False).loss
        offload_experts(model, "cpu", chunk_sequences=3)
        found = causal_lm_loss(model, IDS, input_ids=IDS, rows=10)
    torch.testing.assert_close(found.double(), right.double(), rtol=2e-6, atol=0)


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(Run("mixtral")).eval()
    with pytest.raises(RuntimeError):
        causal_lm_loss(model, IDS.float(), input_ids=IDS)
    assert "forward" not in vars(model.base_model)
    with pytest.raises(ConfigError, match="Embedding isn't a language model of transformers"):
        causal_lm_loss(torch.nn.Embedding(3, 4), IDS, input_ids=IDS)
