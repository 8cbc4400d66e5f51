"""The README does what it says: its commands run on a small project, its links and pictures exist."""

import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(path for path in ROOT.glob("*/README.md") if ".venv" not in str(path))]
TYPED = re.findall(r"^\$ (.+)$", "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)), re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
INLINE = list(dict.fromkeys(re.findall(r"`((?:shovel|dvc|git) [^`]+)`", PROSE)))
TARGETS = sorted(set(re.findall(r"\bmake ([a-z-]+(?: DEVICE=npu)?)(?=`|$)", README, re.MULTILINE)))
INSTEAD = {
    "dvc exp run": "dvc exp run --help",
    "shovel passport": "shovel passport --help",
}  # long, and tested elsewhere
LOOSE = {"register": {"margin_bits_per_byte": 5.0}}  # twelve steps make no better model than the project has


@pytest.fixture(scope="module")
def typed(project):
    """The project after all that the README types on a terminal, with what each command printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        project.set_params(**LOOSE, serve={"port": free.getsockname()[1]})
    project.commit("start")
    answers = []
    for line in TYPED:
        words = ["shovel", "demo"] if line == "make demo" else shlex.split(line)
        done = project.run(*words, check=False)
        answers.append((line, done.returncode, done.stdout + done.stderr))
    return project, answers


def test_every_line_that_is_typed_works(typed) -> None:
    _, answers = typed
    assert len(answers) > 8 and not [(line, text) for line, code, text in answers if code]
    assert not [line for line, _, text in answers if "Traceback" in text]


def test_the_recording_shows_what_the_commands_say(typed) -> None:
    """Figures differ from machine to machine; the sentences are these."""
    answers = {line: text for line, _, text in typed[1]}
    for line, words in {
        "make demo": "A mixture of experts",
        "shovel status": "is the champion of shovel-demo",
        "shovel run finetune --set steps=12 --set learning_rate=1e-3": "see `shovel compare workspace finetune-",
        "shovel review": "holds  no NVIDIA part",
    }.items():
        assert words in answers[line] and words in README


@pytest.mark.parametrize("code", PYTHON)
def test_every_cell_works(typed, code: str) -> None:
    done = typed[0].run("python", "-c", code)
    assert "finetune.learning_rate" in done.stdout and "params.yaml now has" in done.stdout


@pytest.mark.parametrize("line", [line for line in INLINE if line == "shovel run" or line not in TYPED])
def test_every_command_in_a_sentence_works(typed, line: str, tmp_path: Path) -> None:
    """In the order of the README, on what the commands before left: keep, run, propose, promote, roll back."""
    project, _ = typed
    found = next((other for start, other in INSTEAD.items() if line.startswith(start)), line)
    words = shlex.split(found.replace("/mnt/share/shovel", str(tmp_path.parent / "store")))
    if line == "shovel keep":
        words.append(max(path.parent.name for path in (project.folder / ".runs").glob("*-*/run.json")))
    own = {"XDG_CONFIG_HOME": str(tmp_path)} if line == "shovel keys" else {}  # it has a key by now
    done = project.run(*words, check=False, **own)
    if line == "shovel watch":
        assert done.returncode == 2 and "nothing runs here now" in done.stderr
        return
    assert done.returncode in ((0, 1) if words[1] in ("doctor", "audit") else (0,)), done.stdout + done.stderr
    if line == "shovel deploy":
        project.run("shovel", "deploy", "--stop")
    if words[1] == "use":
        project.run("git", "checkout", "-q", "--", "params.yaml")
    project.commit(line)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_make_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", *target.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]
