"""The machinery of mutants: what a pattern matches, what it does not, and what an error reports."""

import ast

import pytest

from icegrt.kernels import dispatch, use_backend
from tests.kernels.mutants.mutation import Mutant, mutated_module, mutated_source

SOURCE = '''
"""A module."""
import triton


def other(x):
    return x + 1.0


@triton.jit(do_not_specialize=["size"])
def kernel(x, size):  # a comment
    total = (
        x + 1.0  # another comment
    )
    if size:
        total = total * 2.0
        total = total - size
    else:
        total = -total
    store(total)
    return total
'''


def mutant(old, new, function="kernel", module="some.triton"):
    return Mutant(module, function, "something", old, new, check=print)


def same_tree(source, expected):
    return ast.dump(ast.parse(source)) == ast.dump(ast.parse(expected))


def test_an_expression_is_replaced_in_the_named_function_alone():
    expected = SOURCE.replace("x + 1.0  # another", "x + 3.0  # another")
    assert same_tree(mutated_source(SOURCE, mutant("x+1.0", "x + 3.0")), expected)
    other = SOURCE.replace("return x + 1.0", "return x")
    assert same_tree(mutated_source(SOURCE, mutant("(x + 1.0)", "x", function="other")), other)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("total = total * 2.0", "pass", {"total = total * 2.0": "pass"}),
        ("total = total*2.0; total = total - size", "total = 0", {"total * 2.0\n        total = total - size": "0"}),
        ("total = -total", "total = 1\ntotal = 2", {"total = -total": "total = 1; total = 2"}),
        ("store(total)", "pass", {"store(total)": "pass"}),
        ("return total", "return x", {"return total": "return x"}),
    ],
)
def test_statements_are_replaced_in_whatever_block_they_lie(old, new, changes):
    expected = SOURCE
    for before, after in changes.items():
        expected = expected.replace(before, after)
    assert expected != SOURCE and same_tree(mutated_source(SOURCE, mutant(old, new)), expected)


def test_decorators_and_the_rest_of_the_module_are_kept():
    mutated = mutated_source(SOURCE, mutant("-total", "total"))
    assert "@triton.jit(do_not_specialize=['size'])" in mutated and "import triton" in mutated


@pytest.mark.parametrize(
    ("old", "new", "matches"),
    [
        ("total", "x", 5),  # reads alone: an assigned name is another node
        ("x * 7.0", "x", 0),
        ("total = total * 9.0", "pass", 0),
        ("total = total - size; store(total)", "pass", 0),  # not in one block
    ],
)
def test_a_pattern_that_does_not_match_once_is_named(old, new, matches):
    message = f"kernels/some/triton.py, function 'kernel', the pattern '{old}' must match exactly once, got {matches}"
    with pytest.raises(LookupError) as error:
        mutated_source(SOURCE, mutant(old, new))
    assert message.replace("'", "") in str(error.value).replace("'", "")


def test_statements_that_match_twice_are_counted():
    source = "def kernel(x):\n    if x:\n        x = 1\n    x = 1\n"
    with pytest.raises(LookupError, match="got 2 matches"):
        mutated_source(source, mutant("x = 1", "x = 2"))


def test_a_missing_function_is_named():
    with pytest.raises(LookupError, match=r"kernels/some/triton.py must define function 'gone' once, found 0"):
        mutated_source(SOURCE, mutant("x", "y", function="gone"))


def test_the_kernel_is_back_after_the_mutant():
    change = {"old": "bounded > plain", "new": "bounded < plain"}
    value_loss = Mutant("value_loss.triton", "value_loss_kernel", "the clip", **change, check=print)
    with use_backend("triton"):
        original = dispatch.select("value_loss")
        with mutated_module(value_loss):
            assert dispatch.select("value_loss") is not original
        assert dispatch.select("value_loss") is original
