"""Rankings: scores, ranks and pairs, sampled tokens used as they were, and every refusal."""

import pytest

from icegrt.data import EncodedDataset, RankingEncoder, untied_pairs
from icegrt.data.training_data import exclude_heldout, hold_out
from icegrt.errors import DataError
from tests.helpers.data_rows import make_tokenizer, row, text
from tests.helpers.encoding import encode_prompt, encode_ranking, encode_rankings, read_rows


def test_scores_ranks_and_pairs(plain):
    scored = encode_ranking(plain, row(prompt="p", responses=["a", "b", ""], scores=[1, 2.5, 0]), 9)
    assert [text(plain, r) for r in scored.responses] == ["a<|im_end|>", "b<|im_end|>", "<|im_end|>"]
    assert scored.scores == [1.0, 2.5, 0.0]
    assert len(scored) == 3 + 5
    ranked = encode_ranking(plain, row(prompt="p", responses=["a", "b", "c"], ranks=[2, 1, 2]), 9)
    assert untied_pairs(ranked.scores) == [(1, 0), (1, 2)]
    pair = encode_ranking(plain, row(prompt="p", chosen="good", rejected="bad"), 9)
    assert text(plain, pair.responses[0]) == "good<|im_end|>"
    assert untied_pairs(pair.scores) == [(0, 1)]


def test_ties_and_margin():
    assert untied_pairs([1.0, 1.0, 1.0]) == []
    assert untied_pairs([0.0, 0.5, 2.0], margin=1.0) == [(2, 0), (2, 1)]
    assert untied_pairs([0.0, 1.0], margin=1.0) == [(1, 0)]


def test_rankings_use_the_template(chat):
    ranking = encode_ranking(chat, row(prompt="ask", responses=["a", "b"], scores=[0, 1]), 99)
    assert ranking.prompt == encode_prompt(chat, row(prompt="ask"), 99)
    assert text(chat, ranking.responses[1]) == "b<|im_end|>"


def test_sampled_ids_are_used_verbatim():
    tokenizer = make_tokenizer(merges=[("a", "b")])
    a, b, eos = *tokenizer.convert_tokens_to_ids(["a", "b"]), tokenizer.eos_token_id
    data = dict(prompt="p", responses=["ab", "ab"], scores=[0, 1])
    merged = encode_ranking(tokenizer, row(**data), 9).responses[0]
    assert merged != [a, b, eos]
    ranking = encode_ranking(
        tokenizer, row(**data, response_ids=[[a, b, eos], [a, b]], finish_reasons=["stop", "length"]), 9
    )
    assert ranking.responses == [[a, b, eos], [a, b]]


def test_stale_ids_give_way_to_the_text(plain):
    ids = [1, 2, 3]
    ranking = encode_ranking(plain, row(prompt="p", responses=["a", "b"], scores=[0, 1], response_ids=[ids, ids]), 9)
    assert [text(plain, r) for r in ranking.responses] == ["a<|im_end|>", "b<|im_end|>"]


@pytest.mark.parametrize("token", [10**6, -1])
def test_ids_that_the_tokenizer_lacks_give_way_to_the_text_and_are_announced_once(plain, token, capsys):
    rows = [row(prompt="p", responses=["a", "b"], scores=[0, 1], response_ids=[[1], [2, token]]) for _ in range(3)]
    rankings = encode_rankings(plain, rows, 9)
    assert all([text(plain, r) for r in x.responses] == ["a<|im_end|>", "b<|im_end|>"] for x in rankings)
    stderr = capsys.readouterr().err
    assert stderr.count(f"key `response_ids[1]`: token {token} is not in the tokenizer") == 1
    assert "Use the tokenizer of the model that sampled them" in stderr


def test_a_response_cut_at_its_length_gets_no_eos(plain, chat):
    for tokenizer in (plain, chat):
        data = dict(prompt="p", responses=["a", "b"], scores=[0, 1], finish_reasons=["length", "stop"])
        assert [text(tokenizer, r) for r in encode_ranking(tokenizer, row(**data), 99).responses] == [
            "a",
            "b<|im_end|>",
        ]


R2 = dict(prompt="p", responses=["a", "b"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (dict(prompt="p"), "columns found: `prompt`; expected `prompt` with `responses` and `scores` or `ranks`"),
        (dict(chosen="a", rejected="b"), "columns found: `chosen`, `rejected`"),
        (R2, "columns found: `prompt`, `responses`"),
        (R2 | dict(scores=[1, 2], ranks=[1, 2]), "has both `scores` and `ranks`"),
        (R2 | dict(scores=[1, 2], chosen="a", rejected="b"), "has `responses` and `chosen`/`rejected`"),
        (R2 | dict(scores=[1]), "key `scores`: 1 entries for 2 responses"),
        (R2 | dict(scores=3), "key `scores`: expected a list, got int"),
        (R2 | dict(scores=[1, float("nan")]), r"key `scores\[1\]`: expected a finite number, got nan"),
        (R2 | dict(scores=[float("inf"), 1]), r"key `scores\[0\]`: expected a finite number"),
        (R2 | dict(scores=[True, 1]), r"key `scores\[0\]`: expected a finite number, got True"),
        (R2 | dict(scores=[None, 1]), r"key `scores\[0\]`: expected a finite number, got None"),
        (R2 | dict(ranks=[0, 1]), r"key `ranks\[0\]`: expected 1 \(best\) or more, got 0"),
        (R2 | dict(ranks=[1, float("nan")]), r"key `ranks\[1\]`: expected a finite number"),
        (dict(prompt="p", responses=["a"], scores=[1]), "key `responses`: expected at least 2 to compare, got 1"),
        (dict(prompt="p", responses="ab", scores=[1, 2]), "key `responses`: expected a list, got str"),
        (dict(prompt="p", responses=["a", 2], scores=[1, 2]), r"key `responses\[1\]`: expected a string, got int"),
        (dict(prompt="p", chosen=[{"role": "user"}], rejected="b"), "key `chosen`: expected a string, got list"),
        (dict(prompt="", chosen="a", rejected="b"), "key `prompt`: is empty"),
        (R2 | dict(scores=[1, 2], response_ids=[[1]]), "key `response_ids`: 1 entries for 2 responses"),
        (R2 | dict(scores=[1, 10**400]), r"key `scores\[1\]`: .*\+-3.4e\+38, as float32 .*got a larger integer"),
        (R2 | dict(scores=[1, -1.8e308]), r"key `scores\[1\]`: expected a finite number between .*, got -inf"),
        (R2 | dict(scores=[1, -1.7e308]), r"key `scores\[1\]`: expected a finite number between .*, got -1.7e\+308"),
        (R2 | dict(ranks=[1, 10**400]), r"key `ranks\[1\]`: expected a finite number"),
        (R2 | dict(scores=[1, 2], response_ids=[[1], []]), r"key `response_ids\[1\]`: is empty"),
        (R2 | dict(scores=[1, 2], response_ids=[[1], ["x"]]), r"`response_ids\[1\]`: expected a list of token ids"),
        (R2 | dict(scores=[1, 2], finish_reasons=["stop"]), "key `finish_reasons`: 1 entries for 2 responses"),
        (R2 | dict(scores=[1, 2], prompt="p" * 8), r"10 tokens \(prompt 8, longest response 2\), but max_length is 9"),
    ],
)
def test_bad_rankings(plain, data, says):
    with pytest.raises(DataError, match=f"^file.jsonl:12: .*{says}"):
        encode_ranking(plain, row(**data), 9)


def test_many_rankings(plain):
    rows = read_rows([R2 | {"prompt": "p" * n, "scores": [0, n]} for n in (1, 8, 2)])
    assert [r.where for r in encode_rankings(plain, rows, 9, truncation="drop")] == ["row 0", "row 2"]
    assert encode_rankings(plain, rows, 20) == [encode_ranking(plain, r, 20) for r in rows]


def test_answers_with_the_same_tokens_are_no_pair():
    assert untied_pairs([2.0, 1.0, 1.5], 0.0, [[5, 1], [5, 1], [6, 1]]) == [(0, 2), (2, 1)]
    assert untied_pairs([2.0, 1.0], 0.0, [[5, 1], [5, 1]]) == []


def test_a_held_out_prompt_is_in_no_training_row(plain):
    def dataset(*prompts):
        rows = [row(prompt=p, responses=["a", "b"], scores=[0, i]) for i, p in enumerate(prompts, 1)]
        return EncodedDataset(rows, RankingEncoder(plain, 20), "rows")

    sources = [(dataset(*"abcdabcdee"), 1.0), (dataset(*"bcdxyz"), 2.0)]
    for seed in range(8):
        training, heldout = hold_out(sources, 0.3, seed)
        parts = [items for items, _ in training]
        trained, kept = ({tuple(r.prompt) for items in side for r in items} for side in (parts, heldout))
        assert trained and kept and not trained & kept
        assert sum(map(len, heldout + parts)) == 16 and [weight for _, weight in training] == [1.0, 2.0]
    ((_, _),), heldout = hold_out([(dataset(*"aaa"), 1.0)], 0.3, 0)
    assert heldout == []
    ((left, _),) = exclude_heldout(sources[:1], [dataset("a", "e")])
    assert {plain.decode(r.prompt) for r in left} == {"b", "c", "d"}
    ((left, _),) = exclude_heldout(sources[:1], [dataset(*"abcde")])  # given for both
    assert len(left) == 10
