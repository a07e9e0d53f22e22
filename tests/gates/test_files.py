"""Files of gates: what is written is read again, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dit_accel import shapes
from dit_accel.controls import SiteInfo
from dit_accel.gates.files import FORMAT, SHIPPED, Gates, load_gates, save_gates

from .conftest import random_weights, wan_gates

Save = Callable[[Gates], Path]


def site(path: str = "blocks.1.attn1", layers: int = 2, expert: str = "transformer", kind: str = "self") -> SiteInfo:
    return SiteInfo(path, kind, 1, layers, expert)


def test_a_file_is_read_as_it_was_written(save: Save) -> None:
    gates = replace(wan_gates(), training={"loss": {"last": 0.25}, "prompts": ["a cat"]})
    found = load_gates(save(gates))
    for name in ("family", "layers", "block", "levels", "training", "d_gate"):
        assert getattr(found, name) == getattr(gates, name)
    assert found.sites.keys() == gates.sites.keys()
    for name, gate in gates.sites.items():
        assert all(torch.equal(a, b) for a, b in zip(gate, found.sites[name], strict=True))


def test_a_file_says_what_it_is_to_other_tools(save: Save) -> None:
    path = save(wan_gates())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT and json.loads(metadata["conditioning"]) == "timestep"
    assert json.loads(metadata["heads_and_head_dim"])["transformer:blocks.0.attn1"] == [2, 16]
    assert load_file(path)["transformer:blocks.1.attn1.key"].shape == (2, 48, 4)


def test_a_bare_model_is_the_only_expert() -> None:
    gates = wan_gates()
    assert gates.gate_of(site(expert="model")) is gates.gate_of(site())
    two = replace(gates, sites=gates.sites | {"transformer_2:blocks.0.attn1": random_weights(2, 16)})
    with pytest.raises(ValueError, match=r"model:blocks.1.attn1"):
        two.gate_of(site(expert="model"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (site(layers=30), "2 of kind self.*30 sites.*train-gate"),
        (site(path="blocks.7.attn1"), "blocks.7.attn1 among them"),
        (site(kind="joint"), "kind joint"),
        (site(expert="transformer_2"), "transformer_2:"),
    ],
)
def test_modules_of_another_model_are_refused(asked: SiteInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wan_gates().gate_of(asked)


def test_other_heads_and_families_are_refused() -> None:
    gates = wan_gates()
    gates.check_heads(site(), 2, 16)
    gates.check_family("WanTransformer3DModel")
    for heads, head_dim in ((12, 16), (2, 32)):
        there = rf"for 2 heads of 16 channels, this model has {heads} of {head_dim} there.*train-gate"
        with pytest.raises(ValueError, match=there):
            gates.check_heads(site(), heads, head_dim)
    with pytest.raises(ValueError, match=r"for a WanTransformer3DModel with 2 .* not for a Flux.*train-gate"):
        gates.check_family("FluxTransformer2DModel")


def rewritten(path: Path, tensors: dict[str, Any] | None = None, **facts: Any) -> Path:
    """The file with other tensors or facts; None takes a fact out."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    metadata |= {name: json.dumps(value) for name, value in facts.items() if value is not None}
    for name in [name for name, value in facts.items() if value is None]:
        del metadata[name]
    save_file(load_file(path) | (tensors or {}), path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": None}, "does not say its family"),
        ({"d_gate": 9}, "shapes"),
        ({"conditioning": "step"}, "conditioned on 'step'"),
        ({"heads_and_head_dim": {}}, "tensors are not those"),
        ({"tensors": {"more": torch.zeros(1)}}, "more"),
        ({"tensors": {"transformer:blocks.0.attn1.query": torch.full((2, 16, 4), torch.nan)}}, "not finite"),
        ({"tensors": {"transformer:blocks.0.attn1.step": torch.zeros(2, 5, 8)}}, "shapes"),
    ],
)
def test_damaged_files_say_what_is_wrong(save: Save, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot read gates from .*{message}.*train-gate"):
        load_gates(rewritten(save(wan_gates()), **change))


def test_files_that_are_no_gates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no gates at.*'shapes-wan'.*train-gate"):
        load_gates(tmp_path / "nothing.safetensors")
    (tmp_path / "noise").write_bytes(b"noise")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    for name in ("noise", "plain"):
        with pytest.raises(ValueError, match="cannot read gates"):
            load_gates(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(wan_gates())
    before = path.read_bytes()

    def fail(*_: Any) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_gates(wan_gates(heads=3), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_the_shipped_gates_fit_the_shipped_model() -> None:
    gates = load_gates("shapes-wan")
    config = json.loads((shapes.path("shapes-wan") / "transformer" / "config.json").read_text())
    assert SHIPPED["shapes-wan"].stat().st_size < 400_000
    assert gates.family == config["_class_name"] and gates.layers == {"self": config["num_layers"]}
    for gate in gates.sites.values():
        assert (gate.heads, gate.head_dim) == (config["num_attention_heads"], config["attention_head_dim"])
    recall = gates.training["held_out_recall"]
    assert recall["pooled"] < recall["gate"] < recall["mass"]
    learned, held_out = (set(gates.training[name]) for name in ("prompts", "held_out_prompts"))
    assert len(learned) == 8 and len(held_out) == 4 and not learned & held_out
