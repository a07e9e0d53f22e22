"""The GPU benchmark as a script: every section at toy sizes, and that it refuses to time what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dit_accel.kernels.sparse_plan import plan_from_blocks
from dit_accel.kernels.support import Support
from dit_accel.kernels.triton_kernels.self_check import Outcome
from dit_accel.processors import RadialAttnProcessor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RATES = {"tflops", "speedup", "efficiency", "overhead"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the published command writes in smoke mode."""
    out = tmp_path_factory.mktemp("smoke") / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize(
    "name", ["check", "ceilings", "window", "planning", "backward", "models", "options", "forward"]
)
def test_every_section_runs(name: str, smoke: dict[str, Any]) -> None:
    section = smoke["sections"][name]
    assert section["status"] == "done" and section["rows"] and section["seconds"] >= 0
    assert not [row for row in section["rows"] if "failed" in row]
    assert name == "options" or len(section["rows"]) > sum("skipped" in row for row in section["rows"])


def test_toy_sizes_claim_no_speed(smoke: dict[str, Any]) -> None:
    rows = [row for section in smoke["sections"].values() for row in section["rows"]]
    assert smoke["smoke"] and not [row for row in rows if RATES & row.keys()]


def test_the_checks_cover_kinds_and_gradients(smoke: dict[str, Any]) -> None:
    rows = smoke["sections"]["check"]["rows"]
    narrow = "random, blocks of half as many keys"
    assert {"random", "banded", "neighborhood", "bitmap", "random, residual", narrow} <= {row["plan"] for row in rows}
    kinds = {row["plan"] for row in rows if row.get("what") == "gradients"}
    assert kinds == {"random", "banded", "neighborhood", "bitmap", "random, residual"}
    assert all(row["ok"] and row["error"] > 0 for row in rows)


def test_methods_and_models(smoke: dict[str, Any]) -> None:
    wan = [row for row in smoke["sections"]["models"]["rows"] if row["model"] == "toy Wan"]
    assert [row["method"] for row in wan] == ["dense", "radial", "block_routing"]
    assert all(row["density"] < 1 for row in wan[1:])
    hunyuan = [row for row in smoke["sections"]["models"]["rows"] if row["model"] == "toy HunyuanVideo"]
    dense = ["dense, full masks left out", "dense, masks as given"]
    assert [row["method"] for row in hunyuan] == [*dense, "radial", "block_routing"]


def test_the_environment_is_on_record(smoke: dict[str, Any]) -> None:
    environment = smoke["environment"]
    assert environment["torch"] == torch.__version__ and {"commit", "triton", "diffusers"} <= environment.keys()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "gpu_sections"]:
        del sys.modules[name]


@pytest.mark.slow
def test_kernel_options_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--smoke", "--only", "options", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert "triton:pointer" in {row["backend"] for row in sections["check"]["rows"]}
    assert {"block mass", "block means"} <= {row.get("what") for row in sections["check"]["rows"]}
    rows = sections["options"]["rows"]
    assert len(rows) == 12 and all(row["error"] < 1e-5 for row in rows)
    assert any(row["error"] > 0 for row in rows if row["softmax"] != "online")


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--out", str(out), *options])
    code = script.main()
    return code, json.loads(out.read_text())


def session(script: ModuleType, left: float) -> Any:
    from time import monotonic

    return import_module("gpu_sections.session").Session(torch.device("cpu"), True, monotonic() + left)


@pytest.mark.parametrize("fault", ["value", "unwritten", "raises"])
def test_wrong_attention_is_not_timed(
    fault: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = import_module("gpu_sections.check")
    right = check.attend

    def attend(*args: Any, **options: Any) -> Any:
        if options.get("backend") == "reference":
            return right(*args, **options)
        if fault == "raises":
            raise RuntimeError("launch failed")
        result = right(*args, **options)
        out = result[0] if isinstance(result, tuple) else result
        out[..., -1, 0] = out[..., -1, 0] + 0.1 if fault == "value" else torch.empty_like(out[..., -1, 0])
        return result

    monkeypatch.setattr(check, "attend", attend)
    code, result = run(script, monkeypatch, tmp_path / "gpu.json", "--only", "ceilings")
    assert code == 1 and set(result["sections"]) == {"check"}
    assert not any(row["ok"] for row in result["sections"]["check"]["rows"] if row.get("what") != "gradients")
    assert "No speed was measured" in capsys.readouterr().err


def test_a_variant_that_failed_its_self_check_stops_the_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = import_module("gpu_sections.check")
    outcome = Outcome(False, None, "its self-check on cuda:0 failed with CompilationError: no such instruction")
    monkeypatch.setattr(check, "known_outcomes", lambda kind: {"pointer": outcome, "tma": outcome})
    code, result = run(script, monkeypatch, tmp_path / "gpu.json", "--only", "ceilings")
    wrong = [row for row in result["sections"]["check"]["rows"] if not row["ok"]]
    assert code == 1 and [row["backend"] for row in wrong] == ["triton:pointer"]
    assert "CompilationError" in capsys.readouterr().err


def test_a_gpu_without_the_pointer_variant_stops_the_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    check = import_module("gpu_sections.check")
    monkeypatch.setattr(check, "check", lambda name, call: Support(name, False, "triton is not installed"))
    (row,) = check._self_checks(torch.device("cuda", 0))
    assert row["backend"] == "triton:pointer" and not row["ok"] and row["failed"] == "triton is not installed"


BAD_VARIANT = {
    "wrong": ("""print('{"plan": "random", "ok": false}')""", "wrong"),
    "raises": ("""print('{"plan": "random", "ok": true}'); raise RuntimeError("no address")""", "no address"),
    "hangs": ("import time; time.sleep(60)", "not done after"),
}


@pytest.mark.parametrize("variant", ["tma", "gluon"])
@pytest.mark.parametrize("fault", BAD_VARIANT)
def test_a_variant_that_fails_in_its_own_process_is_left_out_and_stops_nothing(
    fault: str, variant: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated, check = import_module("gpu_sections.isolated"), import_module("gpu_sections.check")
    program, reason = BAD_VARIANT[fault]
    monkeypatch.setattr(isolated, "_PATIENCE", 2.0 if fault == "hangs" else 60.0)
    refused: list[tuple[Any, ...]] = []
    monkeypatch.setattr(isolated, "refuse", lambda *given: refused.append(given))
    made = session(script, left=99.0)
    rows = list(isolated.judged(made, variant, [sys.executable, "-c", program]))
    assert not rows[-1]["ok"] and not any(row["gate"] for row in rows)
    assert script.problem_of({"status": "done", "rows": [{"ok": True}, *rows]}) is None
    assert reason in made.refused[f"triton:{variant}"]
    assert [(name, device.type) for name, device, _ in refused] == [(variant, "cpu")] and reason in refused[0][2]
    assert f"triton:{variant}" not in check._CHECKED


def test_what_was_measured_without_tma_is_no_full_success(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = import_module("gpu_sections.check")
    bad = {"plan": "any", "backend": "triton:tma", "ok": False, "error": 1.0, "gate": False}
    monkeypatch.setattr(check.isolated, "rows", lambda made, variant: iter([bad] if variant == "tma" else []))
    code, result = run(script, monkeypatch, tmp_path / "gpu.json", "--only", "ceilings")
    assert code == 2 and result["sections"]["ceilings"]["status"] == "done"
    assert "without triton:tma" in capsys.readouterr().err


def test_the_long_check_sees_one_block_too_few(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many keys for each row as in the real one, about 12,000."""
    check, made = import_module("gpu_sections.check"), session(script, left=9.0)
    made.smoke, shape = False, (1, 1, 12032, 16)
    right, random_plan = check.attend, check.random_plan

    def one_less(q: Any, k: Any, v: Any, plan: Any) -> Any:
        keep = plan.to_bool()
        keep[..., 0] = False
        sizes = {"q_len": plan.q_len, "kv_len": plan.kv_len, "block_q": plan.block_q, "block_kv": plan.block_kv}
        return right(q, k, v, plan_from_blocks(keep, **sizes))

    monkeypatch.setattr(check, "random_plan", lambda *given: random_plan(*given[:2], 1.0, *given[3:]))
    assert check._sampled_error(made, shape)["ok"]
    monkeypatch.setattr(check, "attend", one_less)
    assert not check._sampled_error(made, shape)["ok"]
    assert (119056 - 1) * 6 * 24 * 128 > 2**31  # the offset of the last key there


def test_a_refused_variant_is_not_timed(script: ModuleType) -> None:
    forward, made = import_module("gpu_sections.forward"), session(script, left=9.0)
    made.refused["triton:gluon"] = "it hung"
    rows = [row for row in forward._variants(made, forward.SMOKE_SHAPES, 32) if row["variant"] == "triton:gluon"]
    assert [row["skipped"] for row in rows] == ["it hung"]


@pytest.mark.parametrize("fault", ["", "block_mass", "block_means"])
def test_wrong_search_kernels_are_found(fault: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    check = import_module("gpu_sections.check")
    monkeypatch.setattr(check, "check", lambda name, call: Support(name, True, ""))
    for name in ("block_mass", "block_means"):
        monkeypatch.setattr(check, name, on_torch(getattr(check, name), 1.01 if name == fault else 1.0))
    rows = list(check._search_rows(session(script, left=9.0)))
    assert {row["what"] for row in rows} == {"block mass", "block means"}
    assert all(row["ok"] == (row["what"] != fault.replace("_", " ")) for row in rows), rows


def on_torch(search: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """Stands in for a search kernel that is off by a factor."""

    def found(*args: Any, backend: str, **options: Any) -> Any:
        result, off = search(*args, backend="torch", **options), factor if backend == "triton" else 1.0
        return (result[0] * off, result[1]) if isinstance(result, tuple) else result * off

    return found


@pytest.mark.parametrize("hidden", [0, 3])
def test_only_full_masks_are_left_out(hidden: int, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    models = import_module("gpu_sections.models")
    device = torch.device("cpu")
    seen: list[torch.Tensor | None] = []
    transformer = models.build(models.TOY_HUNYUAN, device, torch.float32)
    inputs = models.TOY_HUNYUAN.inputs(device, torch.float32)
    inputs["encoder_attention_mask"][:, 7 - hidden :] = False
    module: Any = sys.modules[type(transformer).__module__]
    stock = module.dispatch_attention_fn

    def dispatch(*args: Any, attn_mask: Any, **options: Any) -> Any:
        seen.append(attn_mask)
        return stock(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    with torch.no_grad():
        expected = transformer(**inputs, return_dict=False)[0]
        assert seen and not any(mask is None for mask in seen)
        seen.clear()
        with models.full_masks_left_out(transformer):
            found = transformer(**inputs, return_dict=False)[0]
    assert seen and all((mask is None) == (hidden == 0) for mask in seen)
    torch.testing.assert_close(found, expected)
    assert module.dispatch_attention_fn is dispatch


def test_time_is_shared_by_weight_among_what_is_asked_for(script: ModuleType) -> None:
    assert list(script.SECTIONS)[-1] == "models"
    assert script.share_of("models", ["check", *script.SECTIONS], 100.0, 500.0) == 500.0
    weights = [script.SECTIONS[name] for name in ("planning", "models")]
    wanted = 100.0 + 400.0 * weights[0] / sum(weights)
    assert script.share_of("planning", ["check", "models", "planning"], 100.0, 500.0) == pytest.approx(wanted)


def test_nothing_starts_behind_the_budget(script: ModuleType) -> None:
    arguments = argparse.Namespace(smoke=False, budget_seconds=-1.0, only=["ceilings"])
    sections = script.finished_sections(arguments, torch.device("cpu"))
    next(sections)  # the check
    assert next(sections) == ("ceilings", {"status": "skipped", "reason": "the budget was used up before", "rows": []})


def test_some_sections_only(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(script, monkeypatch, tmp_path / "gpu.json", "--only", "ceilings")
    statuses = {name: section["status"] for name, section in result["sections"].items()}
    assert code == 0 and list(statuses) == list(script.SECTIONS)
    assert {name for name, status in statuses.items() if status == "done"} == {"check", "ceilings"}


def test_sections_end_in_time(script: ModuleType) -> None:
    rows = script.run_section(lambda _: iter([{"ok": True}] * 9), session(script, left=-1.0))
    assert rows["status"] == "cut" and len(rows["rows"]) == 1
    assert "raise --budget-seconds" in script.problem_of(rows)


def test_broken_sections_keep_their_rows(script: ModuleType) -> None:
    def rows(_: Any) -> Iterator[dict[str, Any]]:
        yield {"ok": True}
        raise ValueError("no such kernel")

    section = script.run_section(rows, session(script, left=9.0))
    assert section["status"] == "failed" and section["rows"] == [{"ok": True}]
    assert "no such kernel" in section["reason"] and "broke off" in script.problem_of(section)


def test_percentiles(script: ModuleType) -> None:
    made = session(script, left=9.0)
    timing = type(made).__init__.__globals__["Timing"].of([float(value) for value in range(11)])
    assert (timing.p20, timing.p50, timing.p80, timing.repeats) == (2.0, 5.0, 8.0, 11)


def printed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str, **replaced: Any
) -> dict[str, Any]:
    """What another script of the folder prints, with some of its globals replaced by what a function makes of them."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variable, make in replaced.items():
        setattr(module, variable, make(getattr(module, variable)))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    module.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("what", ["forward", "loop"])
def test_radial_times_no_building_of_plans(
    what: str, tiny_wan_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = [0]
    dtypes: set[torch.dtype] = set()
    build = RadialAttnProcessor.build_plan

    def build_plan(*args: Any) -> Any:
        built[0] += 1
        return build(*args)

    def watched(timed: Callable[..., Any]) -> Callable[..., Any]:
        def measured(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
            before = built[0]
            result: tuple[float, torch.Tensor] = timed(run)
            dtypes.add(result[1].dtype)
            assert built[0] == before, "a plan was built while the clock ran"
            return result

        return measured

    monkeypatch.setattr(RadialAttnProcessor, "build_plan", build_plan)
    sizes = ["--grid", "3x8x8", "--frames", "9", "--side", "128", "--steps", "4", "--repeats", "2"]
    options = [what, "--model", str(tiny_wan_folder), "--dtype", "bfloat16", "--device", "cpu", *sizes]
    result = printed("radial", monkeypatch, capsys, *options, _timed=watched)
    assert built[0] >= (2 if what == "forward" else 1)
    assert result["dtype"] == "bfloat16" and result["plan_density"] <= 1
    assert what == "loop" or dtypes == {torch.bfloat16}


@pytest.mark.parametrize(("options", "dtype"), [((), "float32"), (("--dtype", "bfloat16"), "bfloat16")])
def test_auto_measures_in_the_dtype_it_names(
    options: tuple[str, ...], dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[torch.dtype] = []

    def watched(dense: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: torch.Tensor) -> Any:
            seen.extend(tensor.dtype for tensor in inputs)
            return dense(*inputs)

        return call

    one = {"radial": (((2, 8, 8),), {"block": 64})}
    result = printed(
        "auto", monkeypatch, capsys, "efficiency", "--repeats", "1", *options, METHODS=lambda _: one, _dense=watched
    )
    assert result["dtype"] == dtype and set(seen) == {getattr(torch, dtype)} and len(result["rows"]) == 1
