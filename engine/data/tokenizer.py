"""What the engine asks of a tokenizer, which is passed in as an object."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from icegrt.errors import CheckpointError


def load_tokenizer(path: str | Path, print_info: Callable[[str], None] = warnings.warn) -> Any:
    """Load the tokenizer of a Hugging Face checkpoint and check it; `print_info` hears what is odd but bearable.

    Raises `CheckpointError` where there is no tokenizer, it cannot be loaded, or it defines no EOS token.
    """
    folder = Path(path)
    if not str(path) or (not folder.exists() and (str(path)[0] in "/.~" or str(path).count("/") > 1)):
        raise CheckpointError(f"{path or 'an empty path'}: no such folder; expected a Hugging Face checkpoint")
    from transformers import AutoTokenizer

    try:
        # Unless told not to, transformers asks on the terminal whether code that came with the files may run.
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes of it, the cause is the checkpoint
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{path}: the tokenizer is code that came with the checkpoint (`auto_map`), which is never run; save "
                "it as a fast tokenizer (tokenizer.json), and remove `auto_map` from tokenizer_config.json"
            ) from None
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {reason}); "
            "expected tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    check_tokenizer(tokenizer, str(path), print_info)
    return tokenizer


def check_tokenizer(tokenizer: Any, name: str = "tokenizer", print_info: Callable[[str], None] = warnings.warn) -> None:
    """Check a tokenizer object: EOS must be defined; a missing pad token, or one equal to EOS, is only remarked on.

    Nothing in the engine is padded, so the pad token is never used and EOS is never taken for padding. A chat template
    is optional: without one, rows of `messages` are refused and prompts are plain text.
    """
    if eos_id(tokenizer, name) == tokenizer.pad_token_id:
        print_info(
            f"{name}: pad token and EOS are both {tokenizer.eos_token!r}; nothing is padded here, and EOS is trained on"
        )
    elif tokenizer.pad_token_id is None:
        print_info(f"{name}: no pad token; none is needed here, as nothing is padded")


def eos_id(tokenizer: Any, name: str = "tokenizer") -> int:
    """The id of the EOS token. Raises `CheckpointError` where none is defined: a response could never end."""
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{name}: no EOS token is defined; set `eos_token` in tokenizer_config.json")
    return tokenizer.eos_token_id


def stop_ids(
    tokenizer: Any,
    hf_config: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    extra: Sequence[int] = (),
) -> list[int]:
    """Tokens that end an answer: the tokenizer's EOS, and what the model's configuration, `generation_config.json` in
    `folder` and the user (`extra`) name. Raises `CheckpointError` for one that the tokenizer does not have."""
    path = Path(folder) / "generation_config.json" if folder is not None else None
    named = {"config.json": (hf_config or {}).get("eos_token_id"), "sampling.stop_token_ids": list(extra)}
    if path is not None and path.is_file():
        try:
            named[str(path)] = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy or write it again") from None
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for where, value in named.items():
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise CheckpointError(f"{where}: expected token ids that end an answer, got {token!r}")
            if token >= len(tokenizer):
                raise CheckpointError(
                    f"{where} names token {token} as EOS, but the tokenizer has only {len(tokenizer)}"
                )
            ids.add(token)
    return sorted(ids)


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer carries a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
