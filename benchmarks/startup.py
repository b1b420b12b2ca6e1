"""How long a user waits before anything is trained: help, the first step on a tiny model, tokenising 5,000 records.

    python benchmarks/startup.py [--data FILE] [--runs 5]

Without --data, the 5,000 records are the bundled sample over and over, numbered so that no two are the same.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.inputs import RECORDS, many_records, tiny_base
from benchmarks.report import figures, header, run_quietly, timed
from lit_tune.data.encode import encode_dataset
from lit_tune.data.prompts import load_template
from lit_tune.modules import load, smollm2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of 5,000 records of your own")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    header()
    command = [sys.executable, "-m", "lit_tune"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = arguments.data or many_records(folder / "records.jsonl")
        fit = [*command, "fit", "--model.base", tiny_base(folder / "tiny"), "--trainer.max_steps", "1"]
        fit += ["--trainer.default_root_dir", name, "--data.path", data]

        def quietly(arguments: list[str]) -> float:
            return timed(run_quietly, arguments)

        figures("lit-tune --help, whole process", [quietly([*command, "--help"]) for _ in range(arguments.runs)])
        quietly(fit)  # the file cache is warm, the tokens are in the token cache
        figures("lit-tune fit, one step of a tiny model", [quietly(fit) for _ in range(arguments.runs)])

        tokenizer, template = load.load_tokenizer(str(smollm2.prepared_directory())), load_template("alpaca")

        def encode(cache: str) -> None:
            encode_dataset(data, tokenizer=tokenizer, template=template, max_length=1024, cache_dir=folder / cache)

        figures(f"tokenise {RECORDS:,} records, first", [timed(encode, f"c{i}") for i in range(arguments.runs)])
        figures(f"tokenise {RECORDS:,} records, again", [timed(encode, "c0") for _ in range(arguments.runs)])


if __name__ == "__main__":
    main()
