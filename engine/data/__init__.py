"""Data: rows of files or dicts, tokens with the prompt told from the response, and the order in which they are seen."""

from icegrt.data.blend import BlendedDataset
from icegrt.data.dataset import ConcatDataset, EncodedDataset, report_lengths
from icegrt.data.examples import (
    Example,
    ExampleEncoder,
    Prompt,
    PromptEncoder,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_prompts,
)
from icegrt.data.open import open_rows, read_rows
from icegrt.data.prompt_sampler import PromptSampler
from icegrt.data.rankings import Ranking, RankingEncoder, encode_ranking, encode_rankings, untied_pairs
from icegrt.data.rows import Row
from icegrt.data.tokenizer import check_tokenizer, eos_id, has_template, load_tokenizer, stop_ids

__all__ = [
    "BlendedDataset",
    "ConcatDataset",
    "EncodedDataset",
    "Example",
    "ExampleEncoder",
    "Prompt",
    "PromptEncoder",
    "PromptSampler",
    "Ranking",
    "RankingEncoder",
    "Row",
    "check_tokenizer",
    "encode_example",
    "encode_examples",
    "encode_prompt",
    "encode_prompts",
    "encode_ranking",
    "encode_rankings",
    "eos_id",
    "has_template",
    "load_tokenizer",
    "open_rows",
    "read_rows",
    "report_lengths",
    "stop_ids",
    "untied_pairs",
]
