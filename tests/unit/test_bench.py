"""The benchmarks: they refuse sides that compute different things, and the README shows what was measured."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from model import build, count_parameters

ROOT = Path(__file__).parents[2]
ROW = {"key": "a", "what": "A step", "target": 2.0, "measured": 2.5, "unit": "x", "spread": [2.4, 2.6]}
SLOW = {"key": "b", "what": "Import", "target": 0.3, "measured": 0.4, "at_least": False, "unit": "s"}
ABSENT = {"key": "c", "what": "Demo", "target": 0.4, "measured": None, "unit": "%", "note": "no run"}
MACHINE = {"processor": "Some CPU", "cores": 2, "memory_gib": 16, "load": "0.1"}
MACHINE |= {"versions": {"torch": "2.13.0", "transformers": "5.23.0"}}
CONTENT = {"date": "2026-11-25", "machine": MACHINE, "rows": [ROW, SLOW, ABSENT]}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The scripts' folder as a script of it sees it."""
    sys.path.insert(0, str(ROOT / "kernels" / "bench"))
    import measure
    import report
    import run
    import shapes
    import step

    sys.path.pop(0)
    modules = ModuleType("bench")
    modules.measure, modules.report, modules.run, modules.shapes, modules.step = measure, report, run, shapes, step
    return modules


def test_the_readme_shows_what_was_measured(bench: ModuleType) -> None:
    block = bench.report.BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    file = ROOT / bench.report.JSON
    measured = bench.report.markdown(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ""
    assert block and block[0] == block[1] + measured + block[2]


def test_a_table_says_met_not_met_and_why_there_is_no_figure(bench: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- bench -->\nold\n<!-- end of bench -->\nend\n")
    bench.report.write_readme(CONTENT, readme)
    bench.report.draw(CONTENT, tmp_path / "bench.svg")
    text = readme.read_text()
    assert "old" not in text and text.endswith("<!-- end of bench -->\nend\n")
    assert "| A step | >= 2.00 x | 2.50 x (2.40 x to 2.60 x) | met |" in text
    assert "| Import | <= 0.30 s | 0.40 s | **not met** |" in text
    assert "| Demo (no run) | >= 40 % | - | no figure |" in text
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")


def test_every_target_has_a_command(bench: ModuleType) -> None:
    for quick in (False, True):
        commands = bench.run.commands(quick)
        assert all((ROOT / "kernels" / "bench" / command[0]).exists() for command in commands)
        assert all(("--quick" in command) == quick for command in commands)


def test_sides_that_differ_end_the_benchmark(bench: ModuleType, monkeypatch, capsys) -> None:
    measure = bench.measure
    measure.require_equal("the loss", {"ours": 2.0, "theirs": 2.00001}, "theirs", {"ours": 1e-4})
    for wrong in (2.1, float("nan")):
        with pytest.raises(measure.Unequal, match="nothing was compared"):
            measure.require_equal("the loss", {"ours": wrong, "theirs": 2.0}, "theirs", {"ours": 1e-4})

    def unequal(*_: object) -> list:
        raise measure.Unequal("the loss of ours is another; nothing was compared")

    monkeypatch.setattr(sys, "argv", ["step.py"])
    with pytest.raises(SystemExit, match="step.py: the loss of ours is another"):
        measure.main("A benchmark.", unequal)


@pytest.mark.parametrize(("warm", "turns"), [(1, "abbaab"), (2, "abbaabba")])
def test_contenders_take_turns_and_the_first_rounds_do_not_count(bench: ModuleType, warm: int, turns: str) -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench.measure.in_turn(sides, 2, torch.device("cpu"), warm=warm)
    assert calls == list(turns) and [len(seconds) for seconds in times.values()] == [2, 2]
    assert bench.measure.in_turn({}, 2, torch.device("cpu")) == {}
    assert bench.measure.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == (3.0, (2.0, 4.0))


@pytest.mark.parametrize("family", ["v3", "v4"])
def test_steps_of_ours_and_of_transformers_have_the_same_losses(bench: ModuleType, family: str) -> None:
    small = {"num_hidden_layers": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128}
    config = bench.shapes.SHAPES[family].replace(**small)
    net = build(config, seed=0).train()
    step, data = bench.step, bench.shapes.tokens(config, 2, torch.device("cpu"), 96)
    theirs = [bench.step.peers.transformers_model(net, flash) for flash in {False, family == "v3"}]
    sides = [step.ours(net), *map(step.transformers_peer, theirs)]
    for _ in range(3):
        losses = [side.step(data, "float32") for side in sides]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("family", ["v3", "v4"])
def test_the_dense_model_has_as_many_active_parameters(bench: ModuleType, family: str) -> None:
    config = bench.shapes.SHAPES[family]
    embedding = config.vocab_size * config.hidden_size
    dense = sum(parameter.numel() for parameter in bench.shapes.dense(config).parameters()) - embedding
    assert dense == pytest.approx(count_parameters(config)[1], rel=2e-3)
