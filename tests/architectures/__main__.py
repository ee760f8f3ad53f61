"""Runs each model type's check in a process of its own, forked from one that has imported all."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from tests.architectures.batches import model_class
from tests.architectures.check import work

SECONDS = 240
CONTEXT = multiprocessing.get_context("forkserver")


def one(name: str) -> dict[str, Any]:
    """Check one model type; a process that dies or takes too long is an outcome too."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()  # type: ignore[no-any-return]
        said = f"more than {SECONDS} s"
    except EOFError:
        process.join()
        said = f"the process died: {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return {"model_type": name, "outcome": "failed", "said": said}


def results(names: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(one, n) for n in names]):
            yield future.result()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="MODEL_TYPE", help="all, if none is given")
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line of JSON for each")
    args = parser.parse_args()
    known = [name for name in sorted(CONFIG_MAPPING) if model_class(CONFIG_MAPPING[name])]
    counts: Counter[str] = Counter()
    unknown = set(args.names) - set(known)
    if unknown:
        parser.error(f"no model types: {', '.join(sorted(unknown))}")
    CONTEXT.set_forkserver_preload(["tests.architectures.check"])
    for found in results(args.names or known, args.jobs):
        counts[found["outcome"]] += 1
        print(
            f"{found['model_type']:32} {found['outcome']:10} {found.get('said', '')[:120]}",
            flush=True,
        )
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(found) + "\n")
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()))
    return 0 if not counts["unequal"] + counts["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
