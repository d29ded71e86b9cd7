"""Judges a run of the stress test by its journal and the trees on the disk; of the store it knows nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from . import trees
from .journal import Event


@dataclass
class Run:
    """One run of a function. Times are places in the journal."""

    id: str
    attempt: str
    pid: int
    call: str
    begun: int
    last: int  # when it was last heard of
    end: Event | None = None

    @property
    def state(self) -> str:
        return self.end["event"] if self.end else "running"


@dataclass
class Deletion:
    """What went, or may have gone, between two moments."""

    ids: list[str]
    begun: int
    ended: float = float("inf")


@dataclass
class Checker:
    """Reads the journal once; problems() has all that is wrong."""

    events: list[Event]
    runs: dict[str, Run] = field(default_factory=dict)
    deletions: dict[str, Deletion] = field(default_factory=dict)
    killed: dict[int, int] = field(default_factory=dict)  # pid -> when that was known

    def __post_init__(self) -> None:
        for now, event in enumerate(self.events):
            kind = event["event"]
            if kind == "begin":
                self.runs[event["attempt"]] = Run(event["id"], event["attempt"], event["pid"], event["call"], now, now)
            elif kind == "alive":
                self.runs[event["attempt"]].last = now
            elif kind in ("ended", "raised", "stopped"):
                run = self.runs[event["attempt"]]
                run.last, run.end = now, event
            elif kind == "deleting":
                self.deletions[event["call"]] = Deletion(event["ids"], now)
            elif kind == "deleted":
                self.deletions[event["call"]].ended = now
            elif kind == "killed":
                self.killed[event["killed"]] = now

    def problems(self, results: Mapping[str, Path]) -> list[str]:
        """All that is wrong; *results* are the trees that are there in the end, by id."""
        checks = (
            self._reported(),
            self._unaccounted(),
            self._overlaps(),
            self._outcomes(),
            self._agreement(),
            self._needless(),
            self._logs(),
            self._locked(),
            self._visible(results),
            self._lost(results),
        )
        return [problem for check in checks for problem in check]

    def summary(self) -> str:
        kinds = Counter(event["event"] for event in self.events)
        states = Counter(run.state for run in self.runs.values())
        got = Counter(event["outcome"] for event in self.events if event["event"] == "got")
        figures = {
            "operations": kinds["call"] + kinds["deleting"] + kinds["borrowed"] + got["hit"],
            "runs": len(self.runs),
            **{state: states[state] for state in ("ended", "raised", "stopped", "running")},
            **{outcome: got[outcome] for outcome in ("built", "attached", "hit")},
            "deletions": kinds["deleting"],
            "locked loans": kinds["borrowed"],
            "logs read": kinds["log"],
            "looks at leased trees": kinds["read"],
            "kills": kinds["killed"],
            "takeovers": self._takeovers(),
        }
        return ", ".join(f"{what}: {count}" for what, count in figures.items())

    def _takeovers(self) -> int:
        """Runs whose id was being built by somebody who was killed in it."""
        pairs = [pair for runs in self._by_id().values() for pair in pairwise(runs)]
        return sum(first.state == "running" for first, _ in pairs)

    def _by_id(self) -> dict[str, list[Run]]:
        by_id: dict[str, list[Run]] = defaultdict(list)
        for run in sorted(self.runs.values(), key=lambda run: run.begun):
            by_id[run.id].append(run)
        return by_id

    def _of(self, *kinds: str) -> Iterator[tuple[int, Event]]:
        return ((now, event) for now, event in enumerate(self.events) if event["event"] in kinds)

    def _reported(self) -> Iterator[str]:
        return (f"pid {event['pid']}: {event['what']}" for _, event in self._of("violation"))

    def _unaccounted(self) -> Iterator[str]:
        """Every run ends, unless it was killed."""
        for run in self.runs.values():
            if run.state == "running" and run.pid not in self.killed:
                yield f"{run} never ended"

    def _overlaps(self) -> Iterator[str]:
        """Nothing is heard of a run once another of its id has begun."""
        for runs in self._by_id().values():
            for first, second in pairwise(runs):
                if first.last > second.begun:
                    yield f"two runs at once: {first} and {second}"

    def _outcomes(self) -> Iterator[str]:
        """Every call has an outcome, and whoever ran a function that of the function."""
        outcomes = {event["call"]: event for _, event in self._of("got", "failed", "left", "no base")}
        for _, event in self._of("call"):
            if event["call"] not in outcomes and event["pid"] not in self.killed:
                yield f"{event} had no outcome"
        callers = Counter(run.call for run in self.runs.values())
        yield from (f"{call} ran its function {count} times" for call, count in callers.items() if count > 1)
        for run in self.runs.values():
            outcome = outcomes.get(run.call)
            if outcome and outcome["event"] != "left":
                kind, fits = outcome.get("outcome", outcome["event"]), {"ended": "built", "raised": "failed"}
                if kind != fits.get(run.state) or outcome["attempt"] != run.attempt:
                    yield f"{run} got {outcome}"

    def _agreement(self) -> Iterator[str]:
        """All who have to do with an attempt are told what became of it."""
        messages: dict[str, set[str]] = defaultdict(set)
        for _, event in self._of("got", "failed"):
            run = self.runs.get(event["attempt"])
            if run is None or run.id != event["id"]:
                yield f"{event} is of a run that nobody knows"
            elif run.state != ("ended" if event["event"] == "got" else "raised"):
                yield f"{event} is not what became of {run}"
            elif event.get("outcome", "built") != "built" and event["call"] == run.call:
                yield f"{event}, though that call ran its function"
            elif event.get("outcome") == "built" and event["call"] != run.call:
                yield f"{event}, though that call did not run it: {run}"
            messages[event["attempt"]].add(event.get("message", ""))
        yield from (f"{attempt} has several outcomes: {said}" for attempt, said in messages.items() if len(said) > 1)

    def _needless(self) -> Iterator[str]:
        """No function runs while its result is there: between the two it was deleted."""
        seen: dict[str, int] = {}
        for now, event in self._of("got", "begin"):
            if event["event"] == "got":
                seen[event["id"]] = now
            elif event["id"] in seen and not self._may_be_gone(event["id"], seen[event["id"]], now):
                yield f"{event} though there was a result, and nobody deleted it"

    def _logs(self) -> Iterator[str]:
        """Who read a log to its end has all of it."""
        for _, event in self._of("log"):
            run = self.runs.get(event["attempt"])
            if run is None or run.id != event["id"]:
                yield f"{event} is of a run that nobody knows"
            elif run.end and run.state != "stopped":
                lines = run.end["lines"]
                if event["lines"] > lines or (event["ended"] and event["lines"] != lines):
                    yield f"{event}, but there are {lines} lines in {run}"

    def _locked(self) -> Iterator[str]:
        """Who borrows a cache that is locked finds what the one before gave back, and is alone."""
        holder, could_be = None, {0}
        for _, event in self._of("borrowed", "returning"):
            if event["event"] == "borrowed":
                if holder and holder["pid"] not in self.killed:
                    yield f"{event} while {holder} had it"
                elif event["found"] not in could_be:
                    yield f"{event}, but it was at one of {could_be}"
                holder = event
                could_be = {event["found"], event["found"] + 1} if event["pid"] in self.killed else {event["found"]}
            else:
                if holder is None or holder["call"] != event["call"]:
                    yield f"{event}, while {holder} had it"
                elif event["kept"]:
                    could_be |= {holder["found"] + 1}
                    if event["pid"] not in self.killed:
                        could_be -= {holder["found"]}
                holder = None

    def _visible(self, results: Mapping[str, Path]) -> Iterator[str]:
        """What is there in the end is what the function of that attempt wrote, on that base."""
        for id, tree in sorted(results.items()):
            try:
                manifest, digest = trees.whole(tree)
            except (trees.NotWhole, OSError, ValueError) as error:
                yield f"{tree} is not whole: {error}"
                continue
            yield from self._written(manifest["attempt"], id, digest)

    def _written(self, attempt: str, id: str, digest: str) -> Iterator[str]:
        run = self.runs.get(attempt)
        if run is None or run.id != id or run.end is None or run.end.get("digest") != digest:
            yield f"{id} has a tree of attempt {attempt} with digest {digest}, but {run}"
        elif base_attempt := run.end["base_attempt"]:
            base = self.runs[base_attempt]
            if base.end is None or base.end.get("digest") != run.end["base_digest"]:
                yield f"{run} began with another tree than its base had: {base}"

    def _lost(self, results: Mapping[str, Path]) -> Iterator[str]:
        """What somebody got is still there, unless it was deleted since; and what is read is what was written."""
        last: dict[str, tuple[int, str]] = {}
        for now, event in self._of("got"):
            last[event["id"]] = now, event["attempt"]
        for id, (when, attempt) in last.items():
            there = trees.whole(results[id])[0]["attempt"] if id in results else None
            if there != attempt and not self._may_be_gone(id, when, len(self.events)):
                yield f"{id} was there with attempt {attempt} and nobody deleted it; now there is {there}"
        for _, event in self._of("read"):
            yield from self._written(event["attempt"], event["id"], event["digest"])

    def _may_be_gone(self, id: str, since: int, until: int) -> bool:
        return any(id in one.ids and one.ended > since and one.begun < until for one in self.deletions.values())
