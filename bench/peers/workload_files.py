"""Write a workload as files that other libraries read: models, tokenizer and prompts.

    python -m bench.peers.workload_files 135M OUT        # OUT/actor, OUT/reward, OUT/prompts.jsonl, OUT/prompts.parquet
    python -m bench.peers.workload_files --flags bench/peers/configs/openrlhf.yaml

The second form prints a file of flags as a command line has them, with environment variables in their values.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import yaml

from bench.end_to_end.workloads import Workload, tokenizer, workload_of

# The text of the messages alone: a prompt has the same tokens in libraries that know conversations only.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write(workload: Workload, out: Path) -> None:
    """Write the files of a workload.

    `actor` and `reward` are folders of a causal model and of a sequence classifier with the head `score`, from which
    the critic starts. A row of `prompts.jsonl` has `prompt` and an empty `answer`, one of `prompts.parquet` the columns
    of verl.

    Args:
        workload: what to write.
        out: folder, which is made if it is missing.
    """
    import pyarrow
    import pyarrow.parquet

    tokens = tokenizer(workload)
    tokens.chat_template = CHAT_TEMPLATE
    for name, model in (("actor", workload.actor()), ("reward", workload.reward_model())):
        model.save_pretrained(out / name)
        tokens.save_pretrained(out / name)
    texts = workload.prompt_texts()
    rows = [json.dumps({"prompt": text, "answer": ""}) for text in texts]
    (out / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    table = pyarrow.Table.from_pylist(
        [
            {
                "data_source": "workload",
                "prompt": [{"role": "user", "content": text}],
                "reward_model": {"style": "model", "ground_truth": ""},
                "extra_info": {"index": i},
            }
            for i, text in enumerate(texts)
        ]
    )
    pyarrow.parquet.write_table(table, out / "prompts.parquet")


def flags(path: Path) -> list[str]:
    """Return the arguments of a file of flags: a list is several values, `true` is a flag without one."""
    arguments = []
    for name, value in yaml.safe_load(path.read_text()).items():
        arguments.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            arguments += [os.path.expandvars(str(one)) for one in values]
    return arguments


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", type=workload_of, help="name, and sizes if they differ")
    parser.add_argument("out", nargs="?", type=Path, help="folder to write")
    parser.add_argument("--flags", type=Path, metavar="FILE", help="print the flags of a file")
    options = parser.parse_args()
    if options.flags is not None:
        print(" ".join(flags(options.flags)))
    elif options.workload is None or options.out is None:
        parser.error("a workload and a folder are needed, or --flags")
    else:
        write(options.workload, options.out)


if __name__ == "__main__":
    main()
