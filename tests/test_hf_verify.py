"""verify on models whose forward is not that of a plain decoder."""

import warnings

import pytest

import packattn
from packattn.hf.tiny import load


@pytest.mark.parametrize("name", ["rwkv", "xlstm"])
def test_verify_takes_no_gradients_through_caches(name):
    model = load(name)  # whose forward over a cache changes it in place
    assert not packattn.verify(model).isolated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by rows
        packattn.patch(model)
    assert packattn.verify(model).ok
