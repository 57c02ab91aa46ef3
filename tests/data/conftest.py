"""Tokenizers of the data tests."""

import pytest

from tests.helpers.data_rows import PLAIN, make_tokenizer


@pytest.fixture(scope="module")
def plain():
    """A tokenizer without a chat template."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    """A tokenizer with a chat template that marks no answer."""
    return make_tokenizer(PLAIN)
