"""The tables of docs/demo.md from the result files of `clora demo`: mean over seeds, each seed in brackets.

for seed in 0 1 2; do clora demo --seed $seed --rank 64 --out demo-64-$seed; done
python benchmarks/demo_table.py demo-64-0 demo-64-1 demo-64-2
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path


def main() -> None:
    """Print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="the --out folders of one rank and several seeds")
    folders = parser.parse_args().folders
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in folders]
    ranks = {result["rank"] for result in results}
    seeds = [result["seed"] for result in results]
    if len(ranks) > 1 or len(set(seeds)) < len(seeds) or not all(result["complete"] for result in results):
        parser.error(f"these results do not belong in one table: ranks {sorted(ranks)}, seeds {seeds}")
    print(f"Rank {ranks.pop()}, seeds {', '.join(map(str, seeds))}:\n")
    print("| method | Last-Acc | learned | BWT | bytes after task 1, after the last | seconds |")
    print("|---|---|---|---|---|---|")
    for name in results[0]["methods"]:
        entries = [result["methods"][name] for result in results]
        last = [entry["last_accuracy"] for entry in entries]
        mean = {key: statistics.mean(entry[key] for entry in entries) for key in ("learned", "backward_transfer")}
        sizes = {(entry["state_bytes_by_task"][0], entry["state_bytes"]) for entry in entries}
        seconds = statistics.median(entry["seconds"] for entry in entries)
        print(
            f"| `{name}` | {statistics.mean(last):.3f} ({', '.join(f'{value:.3f}' for value in last)}) "
            f"| {mean['learned']:.3f} | {mean['backward_transfer']:+.3f} "
            f"| {'; '.join(f'{a:,}, {b:,}' for a, b in sorted(sizes))} | {seconds:.0f} |"
        )


if __name__ == "__main__":
    main()
