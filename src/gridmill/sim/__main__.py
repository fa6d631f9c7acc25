"""Plays seeds: `python -m gridmill.sim SEED`, or `--seeds COUNT --from SEED` for many. Exit code 1 when any fails.

One seed is told call by call; of many only those that fail are, each with the command that plays it again.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time

from gridmill.sim.seed import Report, Without, play


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gridmill.sim", description="Plays seeds of the simulation.")
    parser.add_argument("seed", nargs="?", type=int, help="play this one and tell everything")
    parser.add_argument("--seeds", type=int, default=100, metavar="COUNT", help="play so many (default 100)")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="SEED", help="the first of them")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each Nth, for several processes")
    parser.add_argument("--shrink", action="store_true", help="with one seed: leave out what its failure does not need")
    parser.add_argument("--without-faults", default="", metavar="N,N", help="with one seed: leave these faults out")
    parser.add_argument("--without-calls", default="", metavar="N,N", help="with one seed: leave these calls out")
    parser.add_argument("--log", action="store_true", help="with one seed: what the programs log, in virtual time")
    arguments = parser.parse_args(argv)
    if arguments.seed is not None:
        without = Without(_numbers(arguments.without_faults), _numbers(arguments.without_calls))
        return shrink(arguments.seed) if arguments.shrink else tell(arguments.seed, arguments.log, without)
    logging.disable(logging.CRITICAL)
    return play_many(range(arguments.first, arguments.first + arguments.seeds, arguments.every))


def shrink(seed: int) -> int:
    """Leaves out one fault and one call after the other, for as long as the seed goes on failing."""
    logging.disable(logging.CRITICAL)
    first = play(seed)
    if not first.problems:
        print(f"seed {seed}: nothing is wrong")
        return 0
    without = Without()
    for number in range(len(first.faults)):
        fewer = Without(without.faults | {number}, without.calls)
        without = fewer if play(seed, without=fewer).problems else without
    for number in range(len(first.trace)):
        fewer = Without(without.faults, without.calls | {number})
        without = fewer if play(seed, without=fewer).problems else without
    shown = [",".join(map(str, sorted(numbers))) for numbers in (without.faults, without.calls)]
    print(f"python -m gridmill.sim {seed} --log --without-faults '{shown[0]}' --without-calls '{shown[1]}'")
    return tell(seed, False, without)


def _numbers(text: str) -> frozenset[int]:
    return frozenset(int(word) for word in text.split(",") if word)


def tell(seed: int, with_log: bool, without: Without) -> int:
    """One seed, with all that its callers saw."""
    logging.disable(logging.NOTSET if with_log else logging.CRITICAL)
    if with_log:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(_VirtualTime())
        logging.getLogger("gridmill").addHandler(handler)
        logging.getLogger("gridmill").setLevel(logging.INFO)
    report = play(seed, without=without)
    for line in (*report.trace, *(f"fault at {fault}" for fault in report.faults)):
        print(line)
    print(
        f"seed {seed}: {report.virtual_seconds:.1f} virtual seconds, {report.tokens} ids, {report.moves} moves, "
        f"{report.ends}, digest {report.digest}"
    )
    for problem in report.problems:
        print(f"  WRONG: {problem}")
    return 1 if report.problems else 0


def play_many(seeds: range) -> int:
    """Seeds in a row; one line for each that fails, and one at the end."""
    began = time.perf_counter()
    wrong = virtual_seconds = 0.0
    ends: dict[str, int] = {}
    moves = tokens = 0
    gc.freeze()
    for seed in seeds:
        report = play(seed)
        virtual_seconds += report.virtual_seconds
        moves += report.moves
        tokens += report.tokens
        for end, count in report.ends.items():
            ends[end] = ends.get(end, 0) + count
        if report.problems:
            wrong += 1
            print(f"{complaint(report)}", flush=True)
    seconds = time.perf_counter() - began
    shown = ", ".join(f"{count} {end}" for end, count in sorted(ends.items(), key=lambda item: -item[1]))
    print(
        f"{len(seeds)} seeds, {wrong:.0f} wrong; {seconds / max(1, len(seeds)):.3f} s each, "
        f"{virtual_seconds / seconds:.0f} virtual seconds a second; {tokens} ids, {moves} moves; {shown}"
    )
    return 1 if wrong else 0


def complaint(report: Report) -> str:
    """What was wrong with a seed, and how to see it again."""
    problems = "\n  ".join(problem[:400] for problem in report.problems[:6])
    return f"seed {report.seed} failed; again with: python -m gridmill.sim {report.seed} --log\n  {problems}"


class _VirtualTime(logging.Formatter):
    """Lines of the programs' logs with the time that they believe in, and with what they say besides the message."""

    def format(self, record: logging.LogRecord) -> str:
        import asyncio

        try:
            now = asyncio.get_running_loop().time()
        except RuntimeError:
            now = 0.0
        plain = logging.makeLogRecord({}).__dict__
        extra = {name: value for name, value in record.__dict__.items() if name not in plain}
        lines = f"{now:.4f} {record.name} {record.getMessage()} {extra or ''}"
        return f"{lines}\n{self.formatException(record.exc_info)}" if record.exc_info else lines


if __name__ == "__main__":
    sys.exit(main())
