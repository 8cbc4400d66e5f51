"""Two models on the same documents: their difference beside SciPy's bootstrap, its gate, and what changed."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from pipelines import gates
from pipelines.compare import settings
from pipelines.paired import difference


def table(seed: int, shift: float = 0.0, documents: int = 60) -> pd.DataFrame:
    """Nats and bytes of documents whose difficulty varies a lot."""
    random = np.random.default_rng(0)
    sizes = random.integers(200, 9000, documents)
    hardness = random.uniform(0.5, 3.0, documents)
    noise = np.random.default_rng(seed).normal(shift, 0.02, documents)
    names = [f"{n:064x}" for n in range(documents)]
    return pd.DataFrame({"sha256": names, "bytes": sizes, "nats": sizes * (hardness + noise) * math.log(2)})


def test_difference_and_interval_are_scipys() -> None:
    ours, theirs = table(1, 0.05), table(2)
    found = difference(ours, theirs)
    parts, sizes = (ours["nats"] - theirs["nats"]).to_numpy() / math.log(2), ours["bytes"].to_numpy()

    def ratio(part, size, axis=-1):
        return part.sum(axis) / size.sum(axis)

    expected = bootstrap(
        (parts, sizes), ratio, paired=True, vectorized=True, method="percentile", n_resamples=9999, rng=1
    ).confidence_interval
    assert found.value == pytest.approx(parts.sum() / sizes.sum(), rel=1e-9) and found.documents == 60
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.high == pytest.approx(expected.high, abs=0.1 * width)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.05, "worse"), (-0.05, "better"), (0.0, "no difference that these documents can show")]
)
def test_a_small_difference_shows_although_documents_vary_much_more(shift: float, verdict: str) -> None:
    assert difference(table(1, shift), table(2)).verdict == verdict


def test_only_documents_of_both_count() -> None:
    assert difference(table(1), table(1)).verdict == "the same"
    assert difference(table(1)[:40], table(2)[30:]).documents == 10
    assert difference(table(1)[:30], table(2)[30:]) is None


@pytest.mark.parametrize(
    ("theirs", "their_bits", "passes", "words"),
    [
        (table(2)[:40], 0.5, True, "-0.0"),  # their average is of easier documents, these they find harder
        (table(1, -0.1)[:40], 9.0, False, "+0.050 against the champion on the 40 documents of both"),
        (table(2).assign(sha256="none of ours"), 9.0, True, "the champion has 9.000 on its own"),
        (table(2).assign(sha256="none of ours"), 0.5, False, "the champion has 0.500 on its own"),
        (None, 0.5, False, "the champion has 0.500 on its own"),
    ],
)
def test_the_champion_is_measured_on_the_documents_of_both(
    tmp_path: Path, theirs: pd.DataFrame | None, their_bits: float, passes: bool, words: str
) -> None:
    ours = table(1, -0.05)
    (tmp_path / "evaluate-chat.json").write_text(json.dumps({"bits_per_byte": 1.5}))
    (tmp_path / "plots").mkdir()
    ours.to_csv(tmp_path / "plots/documents-chat.csv", index=False)
    gate = gates._not_worse(tmp_path, gates.Champion(1, their_bits, theirs), 0.02)
    assert gate.passed == passes and words in gate.what, gate


def test_settings_that_differ_are_named_by_their_path() -> None:
    ours = {"finetune": {"steps": 24, "seed": 0}, "policy": {"signed": True}}
    theirs = {"finetune": {"steps": 40, "seed": 0}}
    assert settings(ours, theirs) == [
        {"name": "finetune.steps", "ours": 24, "theirs": 40},
        {"name": "policy", "ours": {"signed": True}, "theirs": None},
    ]
