"""What a session begins from: of all places and the run directory, the newest checkpoint that verifies.

Each training of the run is settled by itself. Candidates are tried newest first, those of this machine before equal
ones elsewhere; one that is brought is verified in a temporary folder and takes its name in one step, after the small
files that belong to it, so that a kill leaves what the next session settles again.
"""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from daramgpt import checkpoint as checkpoints
from daramgpt import ledger
from daramgpt.errors import UserError
from daramgpt.persistence.contents import (
    MANIFEST,
    Sums,
    checkpoint_fault,
    describe_bytes,
    folder_fault,
    is_small,
    manifest_files,
    prefix_of,
    read_sums,
    run_name,
    step_of,
    steps_in,
)
from daramgpt.persistence.place import Place, Target
from daramgpt.run_directory import RunDirectory, write_atomically

SCRATCH = ".fetched"


@dataclass(eq=False)
class Offer:
    """What a place holds of the run.

    Attributes:
        names: of all its files.
        small: small files that verify, by their names.
        faults: of the others, by their names.
        is_lost: whether it could not be reached any more, after that.
    """

    place: Place
    names: set[str]
    small: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    is_lost: bool = False

    def in_folder(self, folder: str) -> list[str]:
        """Names of the files right in a folder."""
        return [name for name in self.names if name.rpartition("/")[0] == folder]


def fetch(places: Sequence[Target], run: RunDirectory, say: Callable[[str], None]) -> None:
    """Bring the newest checkpoint of each training, and the files beside it, into the run directory.

    What this machine has as new stays as it is. Recipe, plan and exports come where there are none; plan and metrics
    come with a newer checkpoint; ledgers are merged. What was brought and what was passed over is said in one line.

    Args:
        places: that are configured; those that cannot be read, as hooks, are left out.
        run: the whole run; held by this process.
        say: takes the line.

    Raises:
        UserError: there is no checkpoint here, and a place cannot be reached or holds none that verifies: never
            begin afresh in silence. Or this disk is full.
    """
    readable = [place for place in places if isinstance(place, Place)]
    if readable:
        _Fetching(run, say).fetch(readable)


class _Fetching:
    def __init__(self, run: RunDirectory, say: Callable[[str], None]) -> None:
        self.run, self.say, self.name = run, say, run_name(run)
        self.scratch = run.path / SCRATCH
        self.numbers = itertools.count()
        self.offers: list[Offer] = []
        self.unreachable: list[str] = []
        # Checkpoints of trainings of which none can be had.
        self.useless: list[str] = []
        self.has_checkpoint = False
        self.brought: list[str] = []
        self.passed: dict[str, None] = {}

    def fetch(self, places: list[Place]) -> None:
        self.run.path.mkdir(parents=True, exist_ok=True)
        _remove(self.scratch)
        try:
            self._look(places)
            prefixes = self._prefixes()
            winners = {prefix: self._settle(prefix) for prefix in prefixes}
            self._refuse_to_begin_afresh()
            # Last: a winner's files go before those of the other places.
            for prefix in prefixes:
                self._fill(prefix, winners[prefix])
            self._merge_ledgers(winners[""])
        except OSError as error:
            raise UserError(
                f"{self.run.path}: what was copied could not be brought back: {error}",
                "make room there and run the same command again",
            ) from None
        finally:
            _remove(self.scratch)
            self._report()

    def _look(self, places: list[Place]) -> None:
        """Ask each place what it has, and read its small files."""
        for place in places:
            offer = Offer(place, set())
            try:
                for name in place.files(self.name):
                    if prefix_of(name) is None:
                        self._pass_over(place, repr(name), "is no name of a file of the run")
                    else:
                        offer.names.add(name)
                self._read_small(offer)
            except OSError as error:
                self._lose(place, error)
            else:
                self.offers.append(offer)

    def _read_small(self, offer: Offer) -> None:
        there = {name for name in offer.names if is_small(name)}
        if not offer.names:
            return
        sums: Sums = {}
        why = f"{MANIFEST} is missing"
        brought = offer.place.bring(self.name, sorted(there | ({MANIFEST} & offer.names)), self._scratch())
        if MANIFEST in offer.names:
            why = f"{MANIFEST} does not name it"
            try:
                sums = read_sums((brought / MANIFEST).read_bytes())
            except ValueError as error:
                why = str(error)
        for name in sorted(there | {name for name in sums if is_small(name)}):
            if name not in there:
                offer.faults[name] = "is missing"
            elif name not in sums:
                offer.faults[name] = f"cannot be verified: {why}"
            elif describe_bytes(data := (brought / name).read_bytes()) not in sums[name]:
                offer.faults[name] = "is not what was written"
            else:
                offer.small[name] = data
        for name, fault in offer.faults.items():
            self._pass_over(offer.place, name, fault)

    def _prefixes(self) -> list[str]:
        """Of all trainings here and elsewhere, the run itself first."""
        found = {""}
        found |= {f"parts/{folder.name}/" for folder in self.run.path.glob("parts/*") if folder.is_dir()}
        found |= {prefix for offer in self.offers for name in offer.names if (prefix := prefix_of(name)) is not None}
        return sorted(found)

    def _settle(self, prefix: str) -> Offer | None:
        """Have the newest checkpoint of a training that verifies; the offer that it came from, None where it was here.

        Where a copy cannot be taken the next older one is.
        """
        here = self.run.path / f"{prefix}checkpoints"
        candidates: list[tuple[int, str, Offer | None]] = []
        if here.is_dir():
            paths = [(step_of(path.name), path) for path in here.iterdir() if path.is_dir()]
            candidates += [(step, f"{prefix}checkpoints/{path.name}", None) for step, path in paths if step is not None]
        for offer in self.offers:
            candidates += [(step, name, offer) for step, name in steps_in(offer.names, prefix).items()]
        # Sorting is stable: this machine's come first among equals, then the places in their order.
        for _, name, source in sorted(candidates, key=lambda candidate: -candidate[0]):
            if source is None:
                fault = checkpoint_fault(self.run.path / name)
                if fault is None:
                    self.has_checkpoint = True
                    return None
                self.passed[f"{self.run.path / name}: {fault}"] = None
            elif not source.is_lost and self._take(prefix, name, source):
                self.has_checkpoint = True
                return source
        self.useless += [f"{source.place.name if source else self.run.path}/{name}" for _, name, source in candidates]
        return None

    def _take(self, prefix: str, name: str, offer: Offer) -> bool:
        """Bring a checkpoint with its plan and metrics, if all of it verifies."""
        if f"{prefix}plan.json" in offer.faults:
            # It may have been trained by another plan than this machine's.
            self._pass_over(offer.place, name, f"its plan.json {offer.faults[f'{prefix}plan.json']}")
            return False
        try:
            folder = self._bring_folder(offer, name, checkpoint_fault)
        except OSError as error:
            self._lose(offer.place, error)
            offer.is_lost = True
            return False
        if folder is None:
            return False
        for file in ("plan.json", "metrics.jsonl"):
            if (data := offer.small.get(f"{prefix}{file}")) is not None:
                write_atomically(self.run.path / f"{prefix}{file}", data.decode("utf-8", errors="replace"))
        final = self.run.path / name
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            # Only one that does not verify is replaced.
            final.rename(self._scratch())
        folder.rename(final)
        write_atomically(final.parent / checkpoints.LATEST, f"{final.name}\n")
        self.brought.append(f"{name} from {offer.place.name}")
        return True

    def _bring_folder(self, offer: Offer, name: str, verify: Callable[[Path], str | None]) -> Path | None:
        """A sealed folder in the scratch folder, verified, with no file but those that its manifest names; or None."""
        folder = offer.place.bring(self.name, offer.in_folder(name), self._scratch()) / name
        fault = verify(folder)
        if fault is not None:
            self._pass_over(offer.place, name, fault)
            return None
        named = {MANIFEST, *manifest_files((folder / MANIFEST).read_bytes())}
        for file in folder.iterdir():
            if file.name not in named:
                file.unlink()
        return folder

    def _refuse_to_begin_afresh(self) -> None:
        if self.useless and not self.unreachable:
            raise UserError(
                f"none of these checkpoints of {self.name} verifies: {', '.join(self.useless)}",
                "bring back a copy, or remove them to begin again",
            )
        if self.unreachable and (self.useless or not self.has_checkpoint):
            raise UserError(
                f"{self.run.path} lacks checkpoints, and copies cannot be reached: {'; '.join(self.unreachable)}",
                "mount the drive, make the folder if it is a new one, see that network and token are there, or take "
                "the place out to begin anew",
            )

    def _fill(self, prefix: str, winner: Offer | None) -> None:
        """Bring what a training lacks here: the winner's, else that of the first place that has it."""
        offers = sorted(self.offers, key=lambda offer: offer is not winner)
        for offer in offers:
            for name, data in offer.small.items():
                path = self.run.path / name
                if prefix_of(name) == prefix and path.name != "ledger.jsonl" and not path.exists():
                    write_atomically(path, data.decode("utf-8", errors="replace"))
                    self.brought.append(f"{name} from {offer.place.name}")
        export = self.run.path / f"{prefix}export"
        for offer in offers:
            if prefix and not offer.is_lost and not export.exists() and offer.in_folder(f"{prefix}export"):
                self._bring_export(offer, f"{prefix}export")

    def _bring_export(self, offer: Offer, name: str) -> None:
        try:
            folder = self._bring_folder(offer, name, folder_fault)
        except OSError as error:
            self._lose(offer.place, error)
            offer.is_lost = True
            return
        if folder is not None:
            (folder / MANIFEST).unlink()
            (self.run.path / name).parent.mkdir(parents=True, exist_ok=True)
            folder.rename(self.run.path / name)
            self.brought.append(f"{name} from {offer.place.name}")

    def _merge_ledgers(self, winner: Offer | None) -> None:
        # The winner's lines come first: what a session wrote last about itself is with the machine that it ran on.
        for offer in sorted(self.offers, key=lambda offer: offer is not winner):
            data = offer.small.get("ledger.jsonl")
            if data is None:
                continue
            elsewhere = self._scratch()
            elsewhere.parent.mkdir(parents=True, exist_ok=True)
            elsewhere.write_bytes(data)
            first, second = (elsewhere, self.run.ledger) if offer is winner else (self.run.ledger, elsewhere)
            text = ledger.merged(first, second)
            if not self.run.ledger.is_file() or text != ledger.merged(self.run.ledger, self.run.ledger):
                write_atomically(self.run.ledger, text)
                self.brought.append(f"ledger.jsonl from {offer.place.name}")

    def _scratch(self) -> Path:
        """A path in the scratch folder that is not there yet."""
        self.scratch.mkdir(exist_ok=True)
        return self.scratch / str(next(self.numbers))

    def _lose(self, place: Place, error: OSError) -> None:
        """Note that a place cannot be read; a fault of this machine's own disk is raised again."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        text = f"{place.name} cannot be read: {' '.join(str(error).split())}"
        self.unreachable.append(text)
        self.passed[text] = None

    def _pass_over(self, place: Place, what: str, why: str) -> None:
        self.passed[f"{place.name} {what}: {why}"] = None

    def _report(self) -> None:
        parts: list[str] = []
        if self.brought:
            parts.append("brought " + ", ".join(self.brought))
        if empty := [offer.place.name for offer in self.offers if not offer.names]:
            parts.append(f"nothing of {self.name} in {', '.join(empty)} yet")
        if not self.brought and not empty and not self.passed:
            parts.append(f"nothing newer in {', '.join(offer.place.name for offer in self.offers)}")
        if self.passed:
            parts.append("passed over " + "; ".join(self.passed))
        self.say("copies: " + "; ".join(parts))


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
