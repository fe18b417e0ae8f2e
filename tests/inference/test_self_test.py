"""A model that can't be carried is refused, in words, before it gives a wrong token."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from petals.inference import self_test
from petals.inference.attention import ragged_attention
from petals.inference.checkpoint import open_checkpoint
from petals.inference.families.shrink import WINDOW, shrink
from petals.inference.progress import Step
from petals.protocol.errors import ModelError
from support.tiny_families import GROUPED, SIZES, tiny_config, tiny_model
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "petals-node" / "self-tests"


def saved(folder: Path, kind: str, **fields: Any) -> Path:
    config = getattr(transformers, kind)(**fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("StableLmConfig", GROUPED, "its layers drop the arguments that attention needs"),
        ("NemotronConfig", GROUPED, "its layers drop the arguments that attention needs"),
        (
            "OPTConfig",
            {
                "vocab_size": 97,
                "hidden_size": 64,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            "not built of one list of blocks",
        ),
        ("GPT2Config", {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4}, "gpt2"),
        (
            "GptOssConfig",
            GROUPED | {"head_dim": 16, "num_local_experts": 4},
            "experts with has_bias=True",
        ),
        ("GPTJConfig", {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4}, "gptj"),
        ("DeepseekV3Config", GROUPED, "deepseek_v3"),
    ],
)
def test_what_the_adapter_cannot_carry_is_refused(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path / "model", kind, **fields)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder)


def test_a_model_that_would_come_out_wrong_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a future transformers called a window by another name."""

    def without_window(*arguments: Any, window: int | None, **options: Any) -> Any:
        return ragged_attention(*arguments, window=None, **options)

    tiny_model(tiny_config("Mistral, window"), tmp_path)
    monkeypatch.setattr("petals.inference.families.generic.ragged_attention", without_window)
    with pytest.raises(ModelError, match=r"mistral cannot be cut .* other logits in a batch"):
        open_checkpoint(tmp_path)


def test_it_is_tried_once(tmp_path: Path, nothing_remembered: Path) -> None:
    tiny_model(tiny_config("Gemma2, soft caps, every second block with a window"), tmp_path)
    said: list[str] = []

    def listen(step: Step) -> None:
        said.append(step.task)

    open_checkpoint(tmp_path, progress=listen)
    assert "trying a tiny gemma2 model against transformers" in said
    assert len(list(nothing_remembered.iterdir())) == 1
    said.clear()
    open_checkpoint(tmp_path, progress=listen)
    assert not [text for text in said if "trying" in text]


def test_what_failed_is_tried_again(tmp_path: Path, nothing_remembered: Path) -> None:
    folder = saved(tmp_path / "model", "StableLmConfig", **GROUPED)
    for _ in range(2):
        with pytest.raises(ModelError, match="drop the arguments"):
            open_checkpoint(folder)
    assert not nothing_remembered.exists()


def test_a_cache_that_cannot_be_written_costs_a_test_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tiny_model(tiny_config("Llama"), tmp_path / "model")
    open_checkpoint(tmp_path / "model")
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "name", ["Qwen3-MoE, one dense block", "SmolLM3, blocks without rotary, window"]
)
def test_a_tiny_config_keeps_what_is_particular(name: str) -> None:
    real = tiny_config(name, num_attention_heads=16, num_key_value_heads=4, head_dim=128)
    small = shrink(real.to_dict())
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (4, 2)
    assert small["head_dim"] == 128
    for field in ("mlp_only_layers", "norm_topk_prob"):
        assert small.get(field) == real.to_dict().get(field)
    if "no_rope_layers" in small:
        assert small["no_rope_layers"] == [1, 0, 1]
    if small.get("layer_types"):
        assert len(set(small["layer_types"])) == len(set(real.layer_types))
        assert small["sliding_window"] in (WINDOW, None)


def test_kinds_of_blocks_that_come_late_are_kept() -> None:
    kinds = ["full_attention"] * 6 + ["sliding_attention"] * 2
    fields = SIZES | {"num_hidden_layers": 8, "layer_types": kinds}
    assert shrink(fields)["num_hidden_layers"] == 7


def test_it_takes_no_large_model_for_a_tiny_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_test, "_MOST_PARAMETERS", 1000)
    tiny_model(tiny_config("Llama"), tmp_path)
    with pytest.raises(ModelError, match="no small model of this kind"):
        open_checkpoint(tmp_path)
