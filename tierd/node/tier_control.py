"""What people ask of the node tier: warm, pin, evict, plan, check. Answers are plain data for the admin socket.

Blocking, for worker threads. Names are resolved here: as `tierd models` prints them, or their last parts if only one
model has these.
"""

from __future__ import annotations

import difflib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tierd.errors import UsageError
from tierd.node.catalog import SourceFile
from tierd.node.copies import Copy, Damaged
from tierd.node.index import Index
from tierd.node.readahead import resident_bytes
from tierd.node.store import opened
from tierd.node.tier_setup import TierParts
from tierd.node.wanted import Priority
from tierd.policy import lru, surplus_bytes
from tierd.units import display

_PROBLEMS_MAX = 1000
_PLAN_VICTIMS_MAX = 100
_REMEMBER_SECONDS = 30.0
"""While files are on their way a listing of this age will do to tell how far; the end is told by a new one."""
_NAME_BYTES_MAX, _PATH_BYTES_MAX = 255, 2048
"""Linux takes no longer names; paths are below the source's own, so less than its 4096 is left for them."""

Row = dict[str, Any]


class TierControl:
    """See the module. `all_models` walks the source for names; `warmed` is told of a path in a model that is warmed."""

    def __init__(
        self,
        parts: TierParts,
        index: Index,
        source: Path,
        all_models: Callable[[], Iterable[bytes]],
        warmed: Callable[[bytes], None] = lambda path: None,
    ) -> None:
        self._parts = parts
        self._index = index
        self._source = source
        self._all_models = all_models
        self._warmed = warmed
        self._check = _Check()

    # --- names ---

    def resolve(self, names: Sequence[str]) -> list[bytes]:
        """The models meant. Raises UsageError for one that is unknown, ambiguous or outside of the source."""
        return list(self._find_files(names))

    def _find_files(self, names: Sequence[str]) -> dict[bytes, Sequence[SourceFile]]:
        """The models meant, each walked once. Raises UsageError, OSError."""
        walk = self._parts.tier.listings.walk
        found = {name: walk(name) for name in dict.fromkeys(_plain(name) for name in names)}
        if all(found.values()):
            return found
        known = sorted({*self._all_models(), *self._parts.store.held_by_model(), *self._parts.usage.pins()})
        meant = dict.fromkeys(_find(name, known) for name in found)
        return {model: found[model] if model in found else walk(model) for model in meant}

    # --- warm ---

    def warm(self, names: Sequence[str]) -> Row:
        """Queue whole models; how far each is."""
        found = self._find_files(names)
        for model, files in found.items():
            if not files:
                raise UsageError(f"{display(model)} is not in the source", hint="`tierd models` lists what is there")
            self._parts.tier.want_files(model, files, Priority.ASKED)
            self._warmed(files[0].path)
        return {"models": [self.progress(model, files) for model, files in found.items()]}

    def progress_of(self, names: Sequence[str]) -> Row:
        """How far models are, by their full names."""
        return {"models": [self.progress(_plain(name)) for name in names]}

    def progress(self, model: bytes, files: Sequence[SourceFile] | None = None) -> Row:
        """How much of a model is on the node, and whether more is on its way; `files` if it was just walked."""
        filler = self._parts.tier.filler  # asked first: what ends meanwhile is then seen as a copy
        queued = any(wanted.model == model for wanted in filler.queued())
        active = [fill for fill in filler.active() if fill.model == model]
        waiting = queued or bool(active)
        if files is None:
            files = self._parts.tier.listings.recent(model, _REMEMBER_SECONDS if waiting else 0.0)
        total = sum(file.identity.size for file in files)
        here = sum(file.identity.size for file in files if self._parts.tier.has(file))
        state = "complete" if here == total else "filling" if waiting else "partial" if here else "absent"
        return {
            "model": display(model),
            "state": state,
            "bytes_done": min(total, here + sum(fill.bytes_landed for fill in active)),
            "bytes_total": total,
            "reason": "" if state in ("complete", "filling") else self._parts.tier.reason(model),
        }

    # --- pin ---

    def pin(self, names: Sequence[str], *, pinned: bool) -> Row:
        """Keep models on the node, or no longer."""
        found = self._find_files(names)
        for model, files in found.items():
            self._index.set_pin(model, pinned, time.time_ns())
            self._parts.usage.pin(model, pinned)
            if pinned:
                self._parts.tier.want_files(model, files, Priority.ASKED)
        return {"models": [{"model": display(model), "pinned": pinned} for model in found]}

    # --- evict ---

    def evict(self, names: Sequence[str]) -> Row:
        """Remove models from the node; the open and the pinned stay, and say so."""
        tier, usage = self._parts.tier, self._parts.usage
        rows = []
        for model in self.resolve(names):
            kept = "open" if tier.leases.holds(model) else "pinned" if usage.pinned(model) else ""
            tier.filler.forget(model)
            freed = 0 if kept else tier.evict(model, "asked for", "asked")
            rows.append({"model": display(model), "bytes": freed, "kept": kept})
        return {"models": rows, "free_bytes": tier.space().free_bytes}

    def evict_until_free(self, free_bytes: int) -> Row:
        """Remove the least recently used until so much is free."""
        tier = self._parts.tier
        rows = []
        for victim in lru(tier.residents()):
            if tier.space().free_bytes >= free_bytes:
                break
            freed = tier.evict(victim.model, f"until {free_bytes} bytes are free", "asked")
            rows.append({"model": display(victim.model), "bytes": freed, "kept": "" if freed else "open"})
        return {"models": rows, "free_bytes": tier.space().free_bytes}

    # --- plan ---

    def plan(self) -> Row:
        """What prefetch and eviction would do now, each line with its reason."""
        tier = self._parts.tier
        space, marks = tier.space(), tier.settings.marks
        residents = tier.residents()
        surplus = left = surplus_bytes(space, marks, evicting=False)
        leaving: list[Row] = []
        for victim in lru(residents):
            if left <= 0 or len(leaving) >= _PLAN_VICTIMS_MAX:
                break
            leaving.append(
                {"model": display(victim.model), "bytes": victim.held_bytes, "reason": "least recently used"}
            )
            left -= victim.held_bytes
        kept = [
            {"model": display(one.model), "bytes": one.held_bytes, "reason": "open" if one.leased else "pinned"}
            for one in residents
            if one.leased or one.pinned
        ]
        choices = [
            {
                "model": display(choice.model),
                "bytes": choice.need_bytes,
                "take": choice.take,
                "victims": [display(victim) for victim in choice.victims],
                "reason": choice.reason,
            }
            for choice in self._parts.prefetcher.plan()
        ]
        return {
            "surplus_bytes": surplus,
            "free_bytes": space.free_bytes,
            "held_bytes": space.held_bytes,
            "limit_bytes": space.limit_bytes,
            "evict": leaving,
            "keep": kept,
            "prefetch": choices,
        }

    # --- models ---

    def describe(self, model: bytes, size: int | None, held: int) -> Row:
        """What `tierd models` adds for the node tier."""
        filler = self._parts.tier.filler
        filling = any(fill.model == model for fill in filler.active())
        state = "filling" if filling else "absent" if not held else "complete" if held == size else "partial"
        return {
            "node_bytes": held,
            "memory_bytes": self._memory_bytes(model) if held else 0,
            "pinned": self._parts.usage.pinned(model),
            "heat": round(self._parts.usage.heat(model), 4),
            "state": state,
        }

    def held_by_model(self) -> dict[bytes, int]:
        """Bytes on the node by model."""
        return self._parts.store.held_by_model()

    def _memory_bytes(self, model: bytes) -> int:
        total = 0
        for copy in self._parts.store.copies_of(model):
            try:
                with opened(self._parts.store, copy) as fd:
                    total += resident_bytes(fd, copy.identity.size)
            except (Damaged, OSError):
                continue
        return total

    # --- check ---

    def start_check(self, *, deep: bool, repair: bool) -> Row:
        """Begin to compare every copy with its seal, and its bytes with their checksums if `deep`."""
        self._check.begin(self._parts, deep=deep, repair=repair)
        return self._check.tell()

    def tell_check(self) -> Row:
        """How far the check is, or what the last one found."""
        return self._check.tell()


class _Check:
    """One check at a time; a second request joins the one that runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._row: Row = {"state": "never"}

    def tell(self) -> Row:
        return dict(self._row)

    def begin(self, parts: TierParts, *, deep: bool, repair: bool) -> None:
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            copies = parts.store.copies()
            self._row = {
                "state": "running", "deep": deep, "repair": repair, "files_done": 0, "files_total": len(copies),
                "bytes_done": 0, "bytes_total": sum(copy.identity.size for copy in copies), "problems": [],
                "problems_total": 0, "leftovers": 0, "files_open": 0,
            }  # fmt: skip
            self._thread = threading.Thread(target=self._run, args=(parts, copies, deep, repair), daemon=True)
            self._thread.start()

    def _run(self, parts: TierParts, copies: list[Copy], deep: bool, repair: bool) -> None:
        row = self._row
        try:
            for copy in copies:
                if not copy.removed:
                    self._check_one(parts, copy, deep, repair)
                row["files_done"] += 1
            row["leftovers"] = parts.store.remove_leftovers() if repair else len(parts.store.leftovers())
            row["bytes_done"] = row["bytes_total"]
        except OSError as error:
            self._note(str(parts.store.directory), "", str(error.strerror))
        finally:
            row["state"] = "done"

    def _check_one(self, parts: TierParts, copy: Copy, deep: bool, repair: bool) -> None:
        row, before = self._row, self._row["bytes_done"]

        def progress(size: int) -> None:
            row["bytes_done"] += size

        # Whoever has the model open would wait for the disk again if its pages went, and those that are mapped
        # stay whatever is advised: of such a copy the check sees what its readers see.
        in_use = deep and parts.tier.leases.holds(copy.model)
        row["files_open"] += in_use
        problem = parts.store.verify(copy, deep=deep, cached=in_use, progress=progress)
        row["bytes_done"] = before + copy.identity.size
        if problem is None:
            return
        self._note(display(copy.path), copy.name, problem)
        if repair:
            parts.tier.want_file(SourceFile(copy.path, copy.identity), copy.model)

    def _note(self, path: str, file: str, problem: str) -> None:
        self._row["problems_total"] += 1
        if len(self._row["problems"]) < _PROBLEMS_MAX:
            self._row["problems"].append({"path": path, "file": file, "problem": problem})


def _plain(name: str) -> bytes:
    try:
        raw = os.fsencode(name).rstrip(b"/")
    except UnicodeEncodeError:
        raw = b""
    parts = raw.split(b"/")
    wrong = any(part in (b"", b".", b"..") or len(part) > _NAME_BYTES_MAX for part in parts)
    if wrong or b"\0" in raw or len(raw) > _PATH_BYTES_MAX:
        raise UsageError(
            f"{name[:100]!r} is no model name", hint="name it as `tierd models` does, such as models/llama-7b"
        )
    return raw


def _find(name: bytes, known: Sequence[bytes]) -> bytes:
    if name in known:
        return name
    ending = [model for model in known if model.endswith(b"/" + name)]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise UsageError(
            f"{display(name)} is ambiguous", hint="did you mean " + ", ".join(display(m) for m in ending[:5]) + "?"
        )
    texts = [display(model) for model in known]
    short = {text.rsplit("/", 1)[-1]: text for text in texts}
    near = difflib.get_close_matches(display(name), texts, n=3) or [
        short[match] for match in difflib.get_close_matches(display(name).rsplit("/", 1)[-1], short, n=3)
    ]
    hint = f"did you mean {', '.join(near)}?" if near else "`tierd models` lists the models"
    raise UsageError(f"no model is named {display(name)}", hint=hint)
