"""The README does what it says: its commands run on a small project, its links and pictures exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("*/README.md") if ".venv" not in str(path))]
TYPED = re.findall(r"^\$ (.+)$", "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
INLINE = list(dict.fromkeys(re.findall(r"`((?:shovel|dvc|git) [^`]+)`", README)))
TARGETS = sorted(set(re.findall(r"\bmake ([a-z-]+(?: DEVICE=npu)?)(?=`|$)", README, re.MULTILINE)))
REWRITES = ("params.yaml", "reports/profile.json")  # by `shovel use` and `shovel accept`; the test takes them back
INSTEAD = {
    "shovel demo": "shovel demo",
    "dvc exp run": "dvc exp run --dry",
    "shovel passport": "shovel passport --help",
}


@pytest.fixture(scope="module")
def typed(project):
    """The project after all that the README types on a terminal, with what each command printed."""
    project.commit("start")
    answers = []
    for line in TYPED:
        words = ["shovel", "demo"] if line == "make demo" else shlex.split(line)
        done = project.run(*words, check=False)
        answers.append((line, done.returncode, done.stdout + done.stderr))
    return project, answers


def test_every_line_that_is_typed_works(typed) -> None:
    _, answers = typed
    assert len(answers) > 10 and not [(line, text) for line, code, text in answers if code]
    assert not [line for line, _, text in answers if "Traceback" in text]


def test_the_recording_shows_what_the_commands_say(typed) -> None:
    """Figures differ from machine to machine; the sentences are these."""
    answers = {line: text for line, _, text in typed[1]}
    for line, words in {
        "shovel status": "Everything is fresh",
        "shovel run --set finetune.steps=12 --keep": "the results of review-",
        "shovel promote": "is the champion now",
        "shovel rollback": "version 1 is the champion again",
    }.items():
        assert words in answers[line] and words in README


@pytest.mark.parametrize("line", [line for line in INLINE if line not in TYPED])
def test_every_command_in_a_sentence_works(typed, line: str, tmp_path: Path) -> None:
    project, _ = typed
    for start, other in INSTEAD.items():
        line = line.replace(start, other) if line.startswith(start) else line
    words = shlex.split(line.replace("/mnt/share/shovel", str(tmp_path.parent / "store")))
    if words[:2] == ["shovel", "watch"]:
        assert "nothing runs here now" in project.run(*words, check=False).stderr
        return
    done = project.run(*words, check=False)
    assert done.returncode in ((0, 1) if words[1] in ("doctor", "audit") else (0,)), done.stdout + done.stderr
    project.run("git", "checkout", "-q", "--", *REWRITES)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_make_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", *target.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("code", PYTHON)
def test_every_cell_works(typed, code: str) -> None:
    done = typed[0].run("python", "-c", code)
    assert "finetune.learning_rate" in done.stdout and "params.yaml now has" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
