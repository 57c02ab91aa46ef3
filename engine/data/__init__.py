"""Rows of files or dicts, their tokens with prompt and response apart, and the order in which training sees them."""

from icegrt.data.blend import BlendedDataset
from icegrt.data.dataset import ConcatDataset, EncodedDataset, report_lengths
from icegrt.data.examples import Example, ExampleEncoder, Prompt, PromptEncoder
from icegrt.data.open import open_rows
from icegrt.data.prompt_sampler import PromptSampler
from icegrt.data.rankings import Ranking, RankingEncoder, untied_pairs
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
    "eos_id",
    "has_template",
    "load_tokenizer",
    "open_rows",
    "report_lengths",
    "stop_ids",
    "untied_pairs",
]
