"""Mask files of strangers by the hundred thousand: `python -m tests.benchmarks.fuzzing [--cases 200000]`.

With `--coverage` and atheris (pip install atheris) the changes are led by the code that they reach; without, they are
drawn at random. Nothing but a load or MaskFileError may come of any, and no code, no file, no memory beyond a multiple.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random

from ..strangers import Watch, mutated

DATA = Path(__file__).parent.parent / "data"


def seeds() -> list[bytes]:
    return [path.read_bytes() for path in sorted(DATA.glob("*.safetensors"))]


def at_random(cases: int, seed: int) -> int:
    """How many went wrong."""
    random, watch, wrong = Random(seed), Watch(seeds_), 0
    begun = time.monotonic()
    for case in range(cases):
        data = mutated(random.choice(seeds_), random.choice(seeds_), random)
        found = watch.wrong(data, memory=case % 10 == 0)
        if found:
            wrong += 1
            print(f"case {case}: {found}\n  {data!r}")
    print(f"{cases:,} files, {watch.loaded:,} of them valid, {wrong} wrong, in {time.monotonic() - begun:.0f} s")
    return wrong


def by_coverage(cases: int, seed: int) -> None:
    import atheris

    watch = Watch(seeds_)
    for module in ("nadhooks.formats.container", "nadhooks.formats.mask_file"):
        for function in vars(sys.modules[module]).values():
            if callable(function) and getattr(function, "__module__", None) == module and hasattr(function, "__code__"):
                atheris.instrument_func(function)

    def one(data: bytes) -> None:
        found = watch.wrong(data)
        if found:
            raise AssertionError(found)

    def mutator(data: bytes, size: int, seed: int) -> bytes:
        random = Random(seed)
        start = data if len(data) > 8 else random.choice(seeds_)
        return mutated(start, random.choice(seeds_), random)[:size]

    atheris.Setup([sys.argv[0], f"-runs={cases}", f"-seed={seed + 1}", "-max_len=65536"], one, custom_mutator=mutator)
    atheris.Fuzz()


seeds_ = seeds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="led by coverage, through atheris")
    options = parser.parse_args()
    if options.coverage:
        by_coverage(options.cases, options.seed)
    else:
        sys.exit(bool(at_random(options.cases, options.seed)))


if __name__ == "__main__":
    main()
