"""What a template makes of text that people wrote."""

from pathlib import Path

from pipelines import pages


def test_words_between_backticks_are_code_and_nothing_else_becomes_markup(tmp_path: Path) -> None:
    expectation = {"suite": "sources", "expectation": "x", "observed": 1, "success": False}
    said = {"what": "<b> is `a<b`, not `c`", "limit": "at most 2 (`contracts.max_drift`)"}
    result = {"success": False, "expectations": [expectation | said]}
    pages.write(tmp_path / "page.html", "contracts.html.j2", result=result, figures=[], drift=[])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<td>&lt;b&gt; is <code>a&lt;b</code>, not <code>c</code>") == 2
    assert page.count("<td>at most 2 (<code>contracts.max_drift</code>)</td>") == 2
