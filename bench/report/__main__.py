"""Write the pages of all devices from their rows, the README's section, or an entry of the history; run no bench.

python -m bench.report                     # bench/results/<device>/index.html of every device
python -m bench.report --readme            # the README's section between its markers
python -m bench.report --check             # status 1 if that section differs from the rows
python -m bench.report --release 0.2       # bench/results/history/0.2.json: the headlines' quotients
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.report import history, readme
from bench.report.page import write_page
from bench.rows import RESULTS, devices


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--readme", action="store_true", help="write the README's section")
    what.add_argument("--check", action="store_true", help="compare the README's section with the rows")
    what.add_argument("--release", metavar="VERSION", help="record the headlines' quotients of a release")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with a folder of rows per device")
    parser.add_argument("--readme-file", type=Path, default=readme.README, help="the README")
    options = parser.parse_args(arguments)
    try:
        if options.readme or options.check:
            return _readme(options)
        if options.release:
            print(f"wrote {history.record(options.release, time.strftime('%Y-%m-%d', time.gmtime()), options.results)}")
            return 0
        folders = devices(options.results)
        if not folders:
            raise ValueError(f"{options.results} has no device with rows; make bench writes them")
        for folder in folders:
            print(f"wrote {write_page(folder)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _readme(options: argparse.Namespace) -> int:
    text = options.readme_file.read_text(encoding="utf-8")
    wanted = readme.updated(text, options.results)
    if text == wanted:
        return 0
    if options.check:
        print(
            f"{options.readme_file} differs from the rows; python -m bench.report --readme writes it", file=sys.stderr
        )
        return 1
    options.readme_file.write_text(wanted, encoding="utf-8")
    print(f"wrote {options.readme_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
