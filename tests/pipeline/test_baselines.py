"""The byte model that evaluations are compared with."""

import pytest

from pipelines.baselines import KneserNey


def test_the_byte_model_is_a_probability() -> None:
    model = KneserNey([b"abracadabra" * 20, b"the quick brown fox"])
    context = b"abra"
    total = sum(2 ** -(model.bits(context + bytes([byte])) - model.bits(context)) for byte in range(256))
    assert total == pytest.approx(1.0, abs=1e-9)
    assert model.bits(b"abracadabra") < model.bits(b"zzzzzzzzzzz")
