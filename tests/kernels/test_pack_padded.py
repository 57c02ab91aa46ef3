"""pack_padded: rows that predict each action, under left, right and no padding and gaps in a response."""

import pytest
import torch

from icegrt.kernels import pack_padded


def test_left_right_and_gaps():
    ids = torch.arange(18).reshape(3, 6)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]])
    chosen = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 1]])
    s = pack_padded(ids, real, chosen)
    assert s.action_tokens_A.tolist() == [4, 5, 7, 8, 9, 15, 17]
    assert s.action_rows_A.tolist() == [3, 4, 6, 7, 8, 13, 16]  # row 13, not padding row 14, predicts token 15
    assert s.cu_actions.tolist() == [0, 2, 5, 7] and s.cu_actions.dtype == torch.int32
    assert s.last_rows_N.tolist() == [5, 9, 17]


def test_select_and_unpack_are_inverse():
    ids = torch.arange(8).reshape(2, 4)
    s = pack_padded(ids, torch.ones(2, 4), torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]))
    x = torch.randn(2, 4)
    packed = s.select(x)
    assert torch.equal(packed, x.flatten()[s.token_rows_A])
    unpacked = s.unpack(packed, fill=-1.0)
    assert unpacked[0, 0] == -1 and torch.equal(s.select(unpacked), packed)
    hidden = torch.randn(2, 4, 3)
    assert torch.equal(s.select(hidden), hidden.flatten(0, 1)[s.token_rows_A])


def test_labels_never_cross_into_the_next_sequence():
    ids = torch.tensor([[1, 2], [3, 4]])
    s = pack_padded(ids, torch.ones(2, 2), torch.tensor([[0, 1], [0, 1]]))
    assert s.action_rows_A.tolist() == [0, 2] and s.action_tokens_A.tolist() == [2, 4]


def test_responses_without_actions_and_empty_batches():
    s = pack_padded(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), torch.zeros(2, 3))
    assert s.cu_actions.tolist() == [0, 0, 0] and s.action_rows_A.shape == (0,)
    for shape in ((0, 3), (2, 0)):
        empty = pack_padded(torch.ones(shape, dtype=torch.long), torch.ones(shape), torch.zeros(shape))
        assert empty.cu_actions.tolist() == [0] * (shape[0] + 1)


def test_refusals_name_the_place():
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"padding .* \[0, 2\]"):
        pack_padded(ids, torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match=r"no attended token before it.*\[0, 1\]"):
        pack_padded(ids, torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 1]]))
    with pytest.raises(ValueError, match="response_mask must have shape"):
        pack_padded(ids, torch.ones(1, 3), torch.ones(1, 2))
