"""`lightning-fastmoe plan`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_fastmoe.cli.entry import main

transformers = pytest.importorskip("transformers")

from lightning_fastmoe.huggingface.trial import sizes_of, skeleton  # noqa: E402


@pytest.fixture
def config(tmp_path: Path) -> str:
    transformers.Qwen3MoeConfig(
        num_hidden_layers=48,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_plan(config: str, capsys) -> None:
    command = ["plan", "--config", config, "--tokens", "256x512", "--host-memory", "100GB"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "48 layers with 58.0 GB of experts; 3.1 GB of everything else" in out
    assert "2.4 GB in 2 slots, 0.0 GB resident" in out
    assert "131,072 tokens" in out
    assert "copies 1.09 s at 53.0 GB/s" in out
    assert "assumed; --measure measures them" in out
    assert "8 GB more: 6 resident layers" in out
    assert main([*command, "--generate", "64", "--gpu-memory", "40GB"]) == 0
    out = capsys.readouterr().out
    assert "64 tokens for each of 256 sequences" in out
    assert "a step copies 58.0 GB: all experts" in out
    command[4] = "4x512"
    assert main([*command, "--generate", "64", "--expert-cache", "6GB"]) == 0
    out = capsys.readouterr().out
    assert "6.0 GB cached experts" in out
    assert "about 29 of 128 experts if they choose evenly, less those cached" in out


@pytest.mark.parametrize(
    ("compression", "host", "gpu", "copies"),
    [("int8", "29.9", "2.5", "0.56"), ("int4", "15.4", "1.9", "0.29")],
)
def test_compressed_experts(
    config: str, compression: str, host: str, gpu: str, copies: str, capsys
) -> None:
    """Bytes per value: 1 or a half, and 2 for 64 of them."""
    command = ["plan", "--config", config, "--tokens", "8x512", "--host-memory", "100GB"]
    assert main([*command, "--compression", compression]) == 0
    out = capsys.readouterr().out
    assert f"host     {host} GB  experts, 58.0 GB until compressed" in out
    assert f"{gpu} GB in 2 slots and a workspace" in out
    assert f"copies {copies} s at 53.0 GB/s" in out


def test_chunks_and_a_cache_on_the_host(config: str, capsys) -> None:
    """131,072 x 2,048 hidden states twice, 24 times those of a chunk, and two chunks' layers."""
    command = ["plan", "--config", config, "--tokens", "256x512", "--host-memory", "100GB"]
    chunks = ["--chunk", "16"]
    assert main([*command, *chunks]) == 0
    out = capsys.readouterr().out
    assert "131,072 tokens in chunks of 16 sequences" in out
    assert f"{(2 * 131_072 + 24 * 8_192) * 2048 * 2 / 1e9:.1f} GB activations\n" in out
    assert main([*command, *chunks, "--generate", "256"]) == 2  # the cache is too large
    assert "smaller chunks (--chunk), or a cache in host memory" in capsys.readouterr().err
    assert main([*command, *chunks, "--generate", "256", "--host-cache"]) == 0
    out = capsys.readouterr().out
    cache = 2 * 48 * 4 * 128 * 2 * 256 * 768 / 1e9
    assert f"experts, {cache:.1f} GB of it keys and values" in out
    assert f"activations, {2 * cache / 48 / 16:.1f} GB keys and values" in out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tokens", "512"], "use SEQUENCESxLENGTH"),
        (["--tokens", "8x512", "--gpu-memory", "4GB"], "The GPU lacks"),
        (["--tokens", "8x512", "--host-memory", "50GB"], "The host lacks 8.0 GB"),
        (["--tokens", "8x512", "--gpu-memory", "many"], "'many' is not a number of bytes"),
        (["--tokens", "8x512", "--groups", "129"], "groups=129 must be between 1 and the 128"),
        (["--tokens", "8x512", "--compression", "fp8"], "compression='fp8' is unknown"),
        (
            ["--tokens", "8x512", "--compression", "int8", "--groups", "2"],
            "compression='int8' decompresses whole layers",
        ),
        (["--tokens", "8x512", "--chunk", "0"], "chunk_sequences=0 must be a positive number"),
        (["--tokens", "8x512", "--gpus", "2", "--groups", "2"], "groups=2 is not supported on sev"),
        (
            ["--tokens", "8x512", "--gpus", "2", "--compression", "int4"],
            "compression='int4' is not supported on several GPUs",
        ),
        (["--tokens", "8x512", "--chunk", "2", "--groups", "2"], "would copy all of them for each"),
        (["--tokens", "8x512", "--slots", "0"], "slots=0 must be at least 1"),
        (["--tokens", "8x512", "--resident-layers", "49"], "between 0 and the model's 48 layers"),
        (["--tokens", "8x512", "--stage", "3"], "--stage 3 has a meaning only with --train"),
        (["--tokens", "8x512", "--train"], "--host-memory 100GB has a meaning only without"),
    ],
)
def test_errors(options: list[str], reason: str, config: str, capsys) -> None:
    command = ["plan", "--config", config, "--host-memory", "100GB", *options]
    assert main(command) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_needs_a_gpu(config: str, capsys) -> None:
    assert main(["plan", "--config", config, "--tokens", "8x512", "--measure"]) == 2
    assert "--measure needs a GPU" in capsys.readouterr().err


def test_what_is_no_models_config_is_not_asked_for(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    training = tmp_path / "run.yaml"
    training.write_text("model: {}")
    for path, reason in (
        (training, "run.yaml is not a model's config.json"),
        (tmp_path / "nowhere", "nowhere does not exist, and models on the Hub have names like"),
        ("typo", "typo does not exist"),
    ):
        assert main(["plan", "--config", str(path), "--tokens", "8x512"]) == 2
        assert reason in capsys.readouterr().err


def test_other_models(tmp_path: Path, capsys) -> None:
    assert main(["plan", "--config", str(tmp_path), "--tokens", "8x512"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path)
    assert main(["plan", "--config", str(tmp_path), "--tokens", "8x512"]) == 2
    assert "has no experts that could be offloaded" in capsys.readouterr().err
    transformers.T5Config().save_pretrained(tmp_path)
    assert main(["plan", "--config", str(tmp_path), "--tokens", "8x512"]) == 2
    assert "No language model of T5Config: Unrecognized" in capsys.readouterr().err


def test_models_of_images_and_text(tmp_path: Path, capsys) -> None:
    """Their sizes are in a config of the text model."""
    transformers.Qwen3_5MoeConfig().save_pretrained(tmp_path)
    command = ["plan", "--config", str(tmp_path), "--tokens", "8x512", "--host-memory", "900GB"]
    assert main([*command, "--gpu-memory", "900GB"]) == 0
    assert "layers with" in capsys.readouterr().out


def test_the_cache_of_a_latent_attention() -> None:
    """transformers caches what the keys and values of all heads are computed from."""
    config = transformers.DeepseekV3Config(
        num_hidden_layers=2,
        first_k_dense_replace=1,
        hidden_size=64,
        intermediate_size=32,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=12,
        vocab_size=50,
    )
    model = skeleton(config, device="cpu")
    with torch.no_grad():
        cache = model(torch.arange(6)[None], use_cache=True).past_key_values
    held = sum(part.keys.nbytes + part.values.nbytes for part in cache.layers)
    assert sizes_of(config).cache_per_token == held / 6


def test_a_plan_of_training(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """ZeRO 2 on 8 GPUs: a rank has 8/EP of the experts' gradients to average, 1/8 to keep."""
    command = ["plan", "--config", config, "--train", "--tokens", "1x4096"]
    assert main([*command, "--gpus", "8", "--gpu-memory", "80GB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 GPUs, ZeRO stage 2, bf16-mixed, Adam, 4,096 tokens per GPU; 30.53 B")
    rows = {row.split()[0]: row.split()[1::2] for row in out.split("\n")[2:6]}
    assert rows["1"][0] == "61.1"
    assert rows["8"][:3] == ["10.3", "8.0", "45.8"]  # 3.1 GB and an eighth of 58.0 GB
    # Twice 4,096 rows of 4,160 bytes and an eighth for each rank; tables of half a megabyte.
    assert [rows[size][4] for size in "1248"] == ["0.0", "0.1", "0.2", "0.3"]
    assert 'by dispatcher "symmetric", which adds to the activations 2.1 GB at 2, 3.5 GB' in out
    assert "without checkpointing, no size fits into 80.0 GB" in out
    assert "with checkpointing, expert_parallel_size=4 is the smallest that fits" in out
    assert main([*command, "--gpus", "8", "--gpu-memory", "80GB", "--dispatcher", "dedup"]) == 0
    out = capsys.readouterr().out
    assert [row.split()[9] for row in out.split("\n")[2:6]] == ["0.0"] * 4
    assert 'by dispatcher "dedup", which adds to the activations 1.7 GB at 2, 3.1 GB' in out
    assert main([*command, "--gpus", "8", "--gpu-memory", "90GB", "--exact"]) == 0
    out = capsys.readouterr().out
    # Eight rows of 4,112 bytes for each token.
    assert [row.split()[9] for row in out.split("\n")[2:6]] == ["0.0", "0.6", "1.2", "2.4"]
    assert main([*command, "--gpus", "8", "--gpu-memory", "60GB", "--stage", "1"]) == 2
    assert "Each GPU lacks" in capsys.readouterr().err


def test_host_memory_is_compared_when_it_is_known(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_fastmoe.planning.host_memory.available", lambda: 57_000_000_000)
    command = ["plan", "--config", config, "--tokens", "8x512"]
    assert main(command) == 0  # of another machine, perhaps
    assert main([*command, "--host-memory", "here"]) == 2
    assert "The host lacks 1.0 GB: the experts take 58.0 GB" in capsys.readouterr().err
