"""Model folders: round trip, the published layout, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from magc.errors import InputError, MissingExtraError
from magc.nn import Mamba2Config, Mamba2LM
from tests.nn.helpers import small_config, small_lm

PUBLISHED: dict[str, Any] = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_lm(dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights.update(changes)
    torch.save({name: t for name, t in weights.items() if t is not None}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"dt_limit": (0.0, 1.0), "norm_epsilon": 1e-6}])
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_lm(dtype=torch.float32, **changes)
    model.save_pretrained(tmp_path)
    loaded = Mamba2LM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    tied = loaded.lm_head.weight is loaded.backbone.embedding.weight
    assert tied == model.config.tie_embeddings
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert loaded.layers[0].mixer.A_log._no_weight_decay
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(model(ids)[0], loaded(ids)[0])
    loaded(ids)[0].sum().backward()


def test_type_and_device_are_the_callers_choice(folder: Path) -> None:
    assert {p.dtype for p in Mamba2LM.from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    edit_weights(folder, **{n: t.half() for n, t in small_lm(torch.float32).state_dict().items()})
    assert {p.dtype for p in Mamba2LM.from_pretrained(folder).parameters()} == {torch.float32}
    with torch.device("meta"):
        assert Mamba2LM.from_pretrained(folder).lm_head.weight.is_meta


def test_the_published_configuration_is_read_and_written() -> None:
    config = Mamba2Config.from_mamba_ssm(PUBLISHED)
    assert config == Mamba2Config.named("mamba2-2.7b")
    assert config.padded_vocab_size == 50288
    assert config.to_mamba_ssm() == PUBLISHED


def test_mixer_options_go_through_the_file() -> None:
    config = small_config(A_init_range=(1.0, 2.0), dt_limit=(0.0, math.inf), ngroups=1)
    data = json.loads(json.dumps(config.to_mamba_ssm()))
    assert data["ssm_cfg"] == {
        "layer": "Mamba2",
        "d_state": 4,
        "headdim": 4,
        "chunk_size": 4,
        "A_init_range": [1.0, 2.0],
    }
    assert Mamba2Config.from_mamba_ssm(data) == config


def test_a_file_that_does_not_say_pads_as_mamba_ssm_does() -> None:
    data = {"d_model": 8, "n_layer": 1, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    assert Mamba2Config.from_mamba_ssm(data).padded_vocab_size == 50280


def test_safetensors_are_read_also_without_the_tied_weight(folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["lm_head.weight"]
    safetensors.save_file(weights, folder / "model.safetensors")
    (folder / "pytorch_model.bin").unlink()
    loaded = Mamba2LM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, weights["backbone.embedding.weight"])
    with pytest.raises(InputError, match="readers prefer it"):
        loaded.save_pretrained(folder)


def test_missing_safetensors_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(MissingExtraError, match=r"magc\[transformers\]"):
        Mamba2LM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [1]}, "attention layers are not supported"),
        ({"d_intermediate": 64}, "MLP layers are not supported"),
        ({"ssm_cfg": {"layer": "Mamba1"}}, "'Mamba1' are not supported"),
        ({"ssm_cfg": {}}, "'Mamba1' are not supported"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"ssm_cfg": {"layer": "Mamba2", "wings": 2}}, r"unknown keys: ssm_cfg\.wings"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_layer": 1}, r"unexpected backbone\.layers\.1"),
        ({"n_layer": 3}, r"missing backbone\.layers\.2\.norm\.weight"),
        ({"vocab_size": 40}, r"backbone\.embedding\.weight has shape \(32, 8\), expected \(48, 8\)"),
    ],
)
def test_wrong_configurations_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        Mamba2LM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.norm_f.weight": None}, r"missing backbone\.norm_f\.weight"),
        ({"extra.weight": torch.zeros(1)}, r"unexpected extra\.weight"),
        ({"backbone.norm_f.weight": torch.zeros(9)}, r"has shape \(9,\), expected \(8,\)"),
        ({"lm_head.weight": torch.zeros(32, 8)}, r"lm_head\.weight differs from backbone\.embedding\.weight"),
    ],
)
def test_wrong_weights_are_refused(folder: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    edit_weights(folder, **changes)
    with pytest.raises(InputError, match=message):
        Mamba2LM.from_pretrained(folder)


def test_missing_and_broken_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        Mamba2LM.from_pretrained(tmp_path / "nowhere")
    weights = folder / "pytorch_model.bin"
    weights.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        Mamba2LM.from_pretrained(folder)
    torch.save([torch.zeros(1)], weights)
    with pytest.raises(InputError, match="must hold a dict of tensors, got list"):
        Mamba2LM.from_pretrained(folder)
    torch.save({"backbone.norm_f.weight": 1}, weights)
    with pytest.raises(InputError, match="is a int"):
        Mamba2LM.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(InputError, match="holds neither"):
        Mamba2LM.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Mamba2LM.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        Mamba2LM.from_pretrained(folder)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(InputError, match="transformers layout"):
        Mamba2LM.from_pretrained(folder)


def test_code_in_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"backbone.norm_f.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        Mamba2LM.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="mamba2-370m"):
        Mamba2Config.named("mamba2-9b")
