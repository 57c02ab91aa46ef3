"""Encode rows in memory: one row or many, through the encoders that the stages use."""

from icegrt.data import (
    EncodedDataset,
    Example,
    ExampleEncoder,
    Prompt,
    PromptEncoder,
    Ranking,
    RankingEncoder,
    Row,
    open_rows,
)


def read_rows(source, limit=0) -> list[Row]:
    return list(open_rows(source, limit))


def encode_example(tokenizer, row, max_length) -> Example:
    return ExampleEncoder(tokenizer, max_length)([row])[0]


def encode_examples(tokenizer, rows, max_length, truncation="error") -> list[Example]:
    return list(EncodedDataset(rows, ExampleEncoder(tokenizer, max_length, truncation)))


def encode_prompt(tokenizer, row, max_prompt, *, chat=True) -> list[int]:
    return PromptEncoder(tokenizer, max_prompt, chat=chat)([row])[0].tokens


def encode_prompts(tokenizer, rows, max_prompt, truncation="error", *, limit_reason="") -> list[Prompt]:
    return list(EncodedDataset(rows, PromptEncoder(tokenizer, max_prompt, truncation, limit_reason=limit_reason)))


def encode_ranking(tokenizer, row, max_length) -> Ranking:
    return RankingEncoder(tokenizer, max_length)([row])[0]


def encode_rankings(tokenizer, rows, max_length, truncation="error") -> list[Ranking]:
    return list(EncodedDataset(rows, RankingEncoder(tokenizer, max_length, truncation)))
