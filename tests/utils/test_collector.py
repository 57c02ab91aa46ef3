"""The garbage collector is paused for imports, and is afterwards what it was."""

import gc

import pytest

from icegrt.utils.collector import collector_paused


def test_the_collector_is_paused_and_starts_again():
    with pytest.raises(ImportError), collector_paused():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with collector_paused(), collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
