"""Load and check a tokenizer; collect the ids that end an answer."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from icegrt.errors import CheckpointError, ConfigError
from icegrt.utils.collector import collector_paused
from icegrt.utils.files import model_folder, read_object
from icegrt.utils.text import first_line

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model")


def load_tokenizer(path: str | Path, print_info: Callable[[str], None] = warnings.warn) -> Any:
    """Load the tokenizer of a Hugging Face checkpoint and check it (see `check_tokenizer`).

    Args:
        path: the checkpoint's folder, that of a run, or a name that transformers can resolve.
        print_info: receives remarks about a usable but unusual tokenizer.

    Raises:
        CheckpointError: the folder has no tokenizer, it cannot be loaded, or it defines no EOS token.
    """
    folder = Path(path)
    if not str(path) or (not folder.exists() and (str(path)[0] in "/.~" or str(path).count("/") > 1)):
        raise CheckpointError(f"{path or 'an empty path'}: no such folder; expected a Hugging Face checkpoint")
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        path = model_folder(folder) if folder.is_dir() else path
    # transformers 5: from a config.json alone it makes an empty tokenizer -> every text has no tokens. We refuse.
    if Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded; expected tokenizer.json and tokenizer_config.json there"
        )
    with collector_paused():
        from transformers import AutoTokenizer

    try:
        # transformers 5.24 asks on the terminal before it runs code from the files. False: refuse without a question.
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # a broken file raises many types; the cause is always the checkpoint
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{path}: the tokenizer is code that came with the checkpoint (`auto_map`), which is never run; save "
                "it as a fast tokenizer (tokenizer.json), and remove `auto_map` from tokenizer_config.json"
            ) from None
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "expected tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    check_tokenizer(tokenizer, str(path), print_info)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write the files of a tokenizer to `folder`.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers 0.23: a failed write raises a plain Exception, "... (os error 28)" -> we raise the system's error.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(folder)) from error


def check_tokenizer(tokenizer: Any, name: str = "tokenizer", print_info: Callable[[str], None] = warnings.warn) -> None:
    """Check that EOS is defined; print a remark if the pad token is missing or equals EOS.

    The engine pads nothing, so it ignores the pad token and never masks EOS as padding. A chat template is optional:
    without one, rows of `messages` are refused and prompts are plain text.

    Raises:
        CheckpointError: no EOS token is defined.
    """
    if eos_id(tokenizer, name) == tokenizer.pad_token_id:
        print_info(
            f"{name}: pad token and EOS are both {tokenizer.eos_token!r}; nothing is padded here, and EOS is trained on"
        )
    elif tokenizer.pad_token_id is None:
        print_info(f"{name}: no pad token; none is needed here, as nothing is padded")


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Check that a model's vocabulary holds all tokens of a tokenizer.

    Raises:
        ConfigError: names the first token that is too many.
    """
    if len(tokenizer) > vocab_size:
        token = tokenizer.decode([vocab_size], skip_special_tokens=False)
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {vocab_size}; they do not "
            f"belong together: the first token that is too many is {token!r}"
        )


def eos_id(tokenizer: Any, name: str = "tokenizer") -> int:
    """Return the id of the EOS token.

    Raises:
        CheckpointError: none is defined, so no response could end.
    """
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{name}: no EOS token is defined; set `eos_token` in tokenizer_config.json")
    return tokenizer.eos_token_id


def stop_ids(
    tokenizer: Any,
    hf_config: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    extra: Sequence[int] = (),
    generation_config: dict[str, Any] | None = None,
) -> list[int]:
    """Return the ids that end an answer, sorted.

    They are the tokenizer's EOS and the ids that `hf_config`, `generation_config` (of a model in memory),
    `generation_config.json` in `folder` and `extra` name.

    Raises:
        CheckpointError: an id is none of the tokenizer's, or the file cannot be read.
    """
    path = Path(folder) / "generation_config.json" if folder is not None else None
    ids_by_origin = {
        "config.json": (hf_config or {}).get("eos_token_id"),
        "sampling.stop_token_ids": list(extra),
    }
    if path is not None and path.is_file():
        ids_by_origin[str(path)] = read_object(path).get("eos_token_id")
    else:
        ids_by_origin["generation_config"] = (generation_config or {}).get("eos_token_id")
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for where, value in ids_by_origin.items():
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
    """Return whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
