"""Every mistake in params.yaml: the key, what is wrong and what to do, in one sentence; exit code 2, no traceback."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from model import ModelConfig
from model.train import TrainConfig
from pipelines.commands import PRESETS, work
from pipelines.params import Params, Section, UserError, load_params
from pipelines.pretrain import require_memory
from pipelines.workbench import overrides

ROOT = Path(__file__).parents[2]


def test_a_preset_takes_the_place_of_what_is_committed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("mine: 1\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "mine"]):
        subprocess.run(["git", *words], check=True)
    for name in ("laptop", "demo"):  # a preset itself is not lost
        work.use(name)
        assert Path("params.yaml").read_bytes() == (PRESETS / f"{name}.yaml").read_bytes()
    Path("params.yaml").write_text("mine: 2\n")
    with pytest.raises(UserError, match=r"commit them or `git checkout params.yaml`"):
        work.use("laptop")
    assert Path("params.yaml").read_text() == "mine: 2\n"


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        ("pretrain", {"stepps": 5}, "`pretrain.stepps` is not a known key; did you mean `steps`?"),
        ("pretrain", {"steps": 0}, "`pretrain.steps` is 0"),
        ("pretrain", {"steps": "many"}, "`pretrain.steps` is 'many'"),
        ("pretrain", {"learning_rate": -1.0}, "`pretrain.learning_rate` is -1.0"),
        ("pretrain", {"warmup_steps": 10**6}, "`warmup_steps` (1000000) must be below `steps`"),
        ("pretrain", {"batch_tokens": 100}, "`batch_tokens` (100) must be a multiple of `sequence_length`"),
        ("pretrain", {"model": {"preset": "demo", "num_experts_per_tok": 99}}, "num_experts_per_tok (99)"),
        ("pretrain", {"model": {"preset": "demo", "hiden_size": 9}}, "did you mean 'hidden_size'"),
        ("pretrain", {"model": {"preset": "tiny"}}, "no preset is called 'tiny'"),
        ("pretrain", {"model": {}}, "choose one of demo"),
        ("pretrain", {"model": {"preset": "demo", "vocab_size": 9}}, "set `encode.vocab_size` instead"),
        ("pretrain", {"precision": "float8"}, "`pretrain.precision` is 'float8'"),
        ("pretrain", {"batch_tokens": 10**18}, "`pretrain.batch_tokens` is 1000000000000000000"),
        ("pretrain", {"seed": 10**26}, "`pretrain.seed` is 1"),
        ("pretrain", {"clip_norm": float("inf")}, "`pretrain.clip_norm` is inf, but it must be a finite number"),
        ("pretrain", {"mtp_weights": [float("nan"), 0.1]}, "`pretrain.mtp_weights.0` is nan"),
        ("pretrain", {"model": {"preset": ["demo"]}}, "no preset is called ['demo']"),
        ("pretrain", {"model": {"preset": "demo", "rope_parameters": {"main": 3}}}, "rope_parameters['main'] is 3"),
        ("evaluate", {"temperature": float("inf")}, "`evaluate.temperature` is inf"),
        ("encode", {"vocab_size": 10}, "`encode.vocab_size` is 10"),
        ("evaluate", {"sequence_length": 10**6}, "`evaluate.sequence_length` (1000000) must not exceed"),
        ("agreement", {"lengths": [8, 4093]}, "`agreement.lengths` (4093), with 4 tokens that the server adds"),
        ("finetune", {"method": "dora"}, "`finetune.method` is 'dora'"),
        ("register", {"name": "a b"}, "`register.name` is 'a b'"),
    ],
)
def test_impossible_values(tmp_path: Path, section: str, changes: dict, sentence: str) -> None:
    content = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    content[section] |= changes
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "params.yaml")
    message = str(caught.value)
    assert sentence.rstrip("?") in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("fetch: [\n", "is not valid YAML at line 2"),
        ("", "must be a section of keys"),
        ("fetch: {}\n", "`clean` is missing"),
        ("- 1\n", "must be a section of keys"),
    ],
)
def test_files_that_are_no_parameters(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="is missing; run from"):
        load_params(tmp_path / "absent.yaml")


def test_the_command_prints_one_sentence_and_exits_with_2(fresh_project) -> None:
    fresh_project.set_params(pretrain={"steps": 0})
    for command in (["shovel", "check"], ["python", "-m", "pipelines.clean"]):
        done = fresh_project.run(*command, check=False)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
        assert "`pretrain.steps` is 0" in done.stderr and "Traceback" not in done.stderr


def test_languages_that_no_dialogue_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    content = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    content["finetune"]["languages"] = ["xx"]
    with Path("params.yaml").open("w") as file:
        YAML().dump(content, file)
    Path("data").mkdir()
    sources = (ROOT / "data/sources.yaml").read_text()
    Path("data/sources.yaml").write_text(sources)
    with pytest.raises(UserError, match=r"`finetune.languages` \['xx'\] is the language of no .* among bn, de, en,"):
        work.check()
    Path("data/sources.yaml").write_text(sources.replace("data/**/*.yml", "data/**/*.jsonl"))  # whose lines may name it
    work.check()
    assert "data/sources.yaml is fine" in capsys.readouterr().out


def test_every_key_is_described_or_plain() -> None:
    plain = {"weight_decay", "seed", "lora_rank", "lora_alpha"}
    for name, field in Params.model_fields.items():
        section = field.annotation
        assert issubclass(section, Section), name
        for key, inner in section.model_fields.items():
            assert inner.description or key in plain, f"{name}.{key}"


def test_presets_load_and_demo_is_the_default() -> None:
    presets = ROOT / "pipelines" / "presets"
    for path in presets.glob("*.yaml"):
        load_params(path)
    assert load_params(presets / "demo.yaml") == load_params(ROOT / "params.yaml")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("learning_rate=[1", "'[1' is not valid YAML"),
        ("steps=*a", "'*a' is not valid YAML"),
        ("steps=!!x", "'!!x' is not valid YAML"),
        ("finetune=3", "finetune is a section of params.yaml; name a key of it, as in finetune.KEY=VALUE."),
        ("pretrain=", "pretrain is a section of params.yaml"),
        ("steps", "--set takes key=value, not 'steps'"),
    ],
)
def test_settings_that_are_none(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        overrides.of_words("finetune", [word])


def test_numbers_of_numpy_are_plain() -> None:
    given = {"learning_rate": np.float32(0.5), "mtp_weights": np.array([0.5, 0.25]), "steps": np.int64(3)}
    found = overrides.of_keywords("pretrain", given)["pretrain"]
    assert found == {"learning_rate": 0.5, "mtp_weights": [0.5, 0.25], "steps": 3} and type(found["steps"]) is int


def test_check_foretells_the_tokens_of_a_training(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    work.check()
    train = load_params().pretrain
    fields = {name: getattr(train, name) for name in TrainConfig.__dataclass_fields__ if hasattr(train, name)}
    tokens = sum(TrainConfig(**fields).rows(step)[1] for step in range(train.steps)) * train.sequence_length
    assert f"pretraining will read {tokens:,} tokens in {train.steps} steps" in capsys.readouterr().out


def test_a_model_larger_than_the_machine_is_refused() -> None:
    require_memory(ModelConfig.preset("demo"))
    with pytest.raises(UserError, match=r"has 68\d billion weights, 2,5\d\d GiB in fp32, and this machine has"):
        require_memory(ModelConfig.preset("v3-671b"))
