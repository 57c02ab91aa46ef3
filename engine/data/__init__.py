"""Data: rows of JSONL or dicts, tokens with the prompt told from the response, and the order in which they are seen."""

from icegrt.data.blend import Blend, PromptOrder
from icegrt.data.encode import (
    Example,
    Prompt,
    describe_lengths,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_prompts,
)
from icegrt.data.ranking import Ranking, encode_ranking, encode_rankings, untied_pairs
from icegrt.data.rows import Row, read_rows
from icegrt.data.tokenizer import check_tokenizer, eos_id, has_template, load_tokenizer, stop_ids

__all__ = [
    "Blend",
    "Example",
    "Prompt",
    "PromptOrder",
    "Ranking",
    "Row",
    "check_tokenizer",
    "describe_lengths",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "encode_prompts",
    "encode_ranking",
    "encode_rankings",
    "eos_id",
    "has_template",
    "load_tokenizer",
    "read_rows",
    "stop_ids",
    "untied_pairs",
]
