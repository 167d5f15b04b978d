"""The mutants: each is one named mistake in the source, and the suites that must notice it.

The text to be changed is looked for word by word and must be there once: whoever changes that line brings its mutant along.
"""

# ruff: noqa: E501  (what stands there and what is put there, side by side)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    name: what goes wrong. file: within the package. changes: (text, what stands there instead). suites: test files, or
    tests in them, of which at least one must fail.
    """

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    suites: tuple[str, ...]


def _mutant(name: str, file: str, before: str, after: str, *suites: str) -> Mutant:
    return Mutant(name, file, ((before, after),), suites)


LOCAL = "tests/storage/test_local.py"
CONTRACT = "tests/storage/test_contract.py"
MANIFEST = "tests/run/test_manifest.py"
RUN = "tests/run/test_run.py"
WEIGHTS = "tests/run/test_weights.py"
RESTORE = "tests/run/test_restore.py"
HISTORY = "tests/run/test_history.py"
MONITOR = "tests/policy/test_monitor.py"
RETENTION = "tests/policy/test_retention.py"
TENSORFILE = "tests/core/test_tensorfile.py"
STRICT = "tests/core/test_strict.py"
PATHS = "tests/core/test_paths.py"
TREE = "tests/core/test_tree.py"
TRACE = "tests/core/test_trace.py"
OWNER = "tests/run/test_owner.py"
DAMAGE = "tests/faults/test_damage.py"
FAIL_AT_N = "tests/faults/test_fail_at_n.py"
STAYS = "tests/faults/test_what_stays.py"
WRITERS = "tests/faults/test_writers.py"
GOING_BACK = "tests/training/test_going_back.py"
KEEPING = "tests/training/test_retention.py"
BACKGROUND = "tests/training/test_background.py"
UNCHANGED = "tests/training/test_unchanged.py"
OVERLAP = "tests/training/test_overlap.py"
TORN = "tests/training/test_torn.py"
RECALL = "tests/training/test_recall.py"
TIER = "tests/training/test_tier.py"
RING = "tests/training/test_ring.py"
LOOP = "tests/training/test_loop.py"
EXACTNESS = "tests/training/test_exactness.py"
HEALTH = "tests/training/test_health.py"
ATTEMPT = "tests/run/test_attempt.py"
TRIPWIRES = "tests/training/test_tripwires.py"
LIMITS = "tests/attacks/test_limits.py"

DURABILITY = (
    _mutant(
        "fsync of a file lies", "storage/system.py",
        "            return\n    os.fsync(descriptor)\n", "            return\n    os.fstat(descriptor)\n", LOCAL,
    ),
    _mutant(
        "fsync of a directory lies", "storage/system.py",
        "            try:\n                os.fsync(descriptor)\n", "            try:\n                os.fstat(descriptor)\n", LOCAL,
    ),
    _mutant(
        "a failed fsync is no error", "storage/system.py",
        "            return\n    os.fsync(descriptor)\n",
        "            return\n    with contextlib.suppress(OSError):\n        os.fsync(descriptor)\n", LOCAL,
    ),
    _mutant(
        "a directory that cannot be fsynced is none of our business", "storage/system.py",
        "                if error.errno in _UNSUPPORTED:\n                    return error\n                raise\n",
        "                return None\n", LOCAL,
    ),
    _mutant(
        "published without an fsync of the directory", "storage/local.py",
        "        self._sync_directory(os.path.dirname(target))\n", "        lstat(os.path.dirname(target))\n", LOCAL,
    ),
    _mutant(
        "published without an fsync of the names in it", "storage/local.py",
        "            self._sync_directory(directory)\n        self._move(", "            lstat(directory)\n        self._move(", LOCAL,
    ),
    _mutant(
        "directories that were made are not durable", "storage/local.py",
        "                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)\n"
        "            self._sync_directory(above)\n",
        "                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), directory)\n", LOCAL,
    ),
    _mutant(
        "what was removed comes back", "storage/local.py",
        "            self._sync_directory(os.path.dirname(where))\n\n    def replace(",
        "            lstat(os.path.dirname(where))\n\n    def replace(", LOCAL,
    ),
    _mutant(
        "renamed over what is there", "storage/local.py",
        "            rename_to_unused(source, target)\n", "            os.rename(source, target)\n", LOCAL,
    ),
    _mutant(
        "the rename is skipped, files are written in place", "storage/local.py",
        "            rename_to_unused(source, target)\n",
        '            __import__("shutil").copytree(source, target)\n            __import__("shutil").rmtree(source)\n',
        LOCAL,
    ),
    _mutant(
        "small files are overwritten in place", "storage/local.py",
        "                os.replace(pending, where)\n",
        '                __import__("shutil").copyfile(pending, where)\n                os.unlink(pending)\n', LOCAL,
    ),
    _mutant(
        "what is there is opened and overwritten", "storage/system.py",
        "NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL |", "NEW = os.O_WRONLY | os.O_CREAT |", LOCAL, CONTRACT,
    ),
    _mutant(
        "a short write counts as a whole one", "storage/local.py",
        "                data = data[count:]\n", "                data = data[len(data) :]\n", LOCAL,
    ),
    _mutant(
        "the next row is glued to half of one", "storage/local.py",
        "                        os.ftruncate(descriptor, found.st_size)\n", "                        os.fstat(descriptor)\n",
        LOCAL,
    ),
    _mutant(
        "links are followed", "storage/system.py",
        "READ = os.O_RDONLY | os.O_NOFOLLOW |", "READ = os.O_RDONLY |", LOCAL, DAMAGE,
    ),
    _mutant(
        "whatever was opened is read", "storage/system.py",
        "    if not stat.S_ISREG(found.st_mode):\n        raise Damaged(", "    if False:\n        raise Damaged(", LOCAL, DAMAGE,
    ),
)  # fmt: skip

ORDER = (
    Mutant(
        "the manifest is written first", "run/commit.py",
        (
            ('CHECKPOINTS = "checkpoints"\n', 'CHECKPOINTS = "checkpoints"\n_late: list[tuple[str, bytes]] = []\n'),
            ('    store.create(f"{draft}/{STATE}", [data])\n', '    _late.append((f"{draft}/{STATE}", data))\n'),
            (
                '        store.create(f"{draft}/{MANIFEST}", [encode(manifest)])\n',
                (
                    '        store.create(f"{draft}/{MANIFEST}", [encode(manifest)])\n'
                    "        path, data = _late.pop()\n        store.create(path, [data])\n"
                ),
            ),
        ),
        (FAIL_AT_N,),
    ),
    _mutant(
        "published before the manifest is written", "run/commit.py",
        '        store.create(f"{draft}/{MANIFEST}", [encode(manifest)])\n'
        "        name = _publish(store, draft, name, manifest)\n",
        "        name = _publish(store, draft, name, manifest)\n"
        '        store.create(f"{checkpoint_path(name)}/{MANIFEST}", [encode(manifest)])\n', FAIL_AT_N, RUN,
    ),
    _mutant(
        "half a save is left behind", "run/commit.py",
        "        if not published:  #", "        if published is None:  #", FAIL_AT_N,
    ),
    _mutant(
        "pending saves are never swept", "run/commit.py",
        "    left = [checkpoint_path(name) for name in store.list(CHECKPOINTS) if _is_left_over(name)]\n",
        "    left = [checkpoint_path(name) for name in () if _is_left_over(name)]\n", STAYS, FAIL_AT_N,
    ),
    _mutant(
        "the sweep takes the files of others", "run/commit.py",
        "    return name.startswith(PENDING) or (trash", '    return name.startswith(".") or (trash', STAYS,
    ),
    _mutant(
        "the trash is swept at every start", "run/commit.py",
        'trash["doomed"] is not None)', 'trash["name"] is not None)', RUN, STAYS,
    ),
    _mutant(
        "data goes before the manifest", "run/commit.py",
        "        store.withdraw(checkpoint_path(name), checkpoint_path(trash))\n",
        "        for file in sorted(store.list(checkpoint_path(name)), key=MANIFEST.__eq__) if doomed else ():\n"
        '            store.remove(f"{checkpoint_path(name)}/{file}")\n'
        "        store.withdraw(checkpoint_path(name), checkpoint_path(trash))\n", FAIL_AT_N,
    ),
    _mutant(
        "retention before the save is acknowledged", "run/attempt.py",
        "        name, manifest, digests = commit.commit(self._store, manifest, parts, confirm=confirm)\n",
        "        for entry in self.run.checkpoints[:-1]:\n"
        "            if entry.name not in {*self.run.pins.values(), self.run.resumed_from}:\n"
        "                self._remove(entry.name)\n"
        "        name, manifest, digests = commit.commit(self._store, manifest, parts, confirm=confirm)\n", FAIL_AT_N,
    ),
    _mutant(
        "removed before anybody looks what is left", "run/attempt.py",
        "        self.run.check_survivors([*doomed, *strip], damaged=self._damaged)\n", "", ATTEMPT,
    ),
    _mutant(
        "the best goes before its weights are taken", "run/attempt.py",
        "            try:\n                taken = weights.take(entry,",
        "            self.run.withdraw_unpinned(entry.name)\n            try:\n                taken = weights.take(entry,",
        FAIL_AT_N, WEIGHTS,
    ),
    _mutant(
        "rows are durable after the commit they rank", "run/attempt.py",
        "        self.sync()  # a row lost in a power cut would turn the best into an unranked checkpoint\n", "",
        ATTEMPT,
    ),
    _mutant(
        "after a failed append the same file goes on", "run/attempt.py",
        "            self._part += 1\n", "", ATTEMPT,
    ),
    _mutant(
        "a pin set meanwhile is not seen", "run/run.py",
        "        if trash is not None and name in self.pins.values():\n", "        if trash is None and name in self.pins.values():\n",
        WRITERS,
    ),
)  # fmt: skip

BEST_AND_LAST = (
    _mutant(
        "the best is remembered, not queried", "run/run.py",
        "        found = {facts[0]: facts for facts in self._committed()}\n",
        '        if hasattr(self, "_kept"):\n            return self._kept\n'
        "        found = {facts[0]: facts for facts in self._committed()}\n"
        "        self._kept = first_whole(\n"
        "            self._checkpoint(*found[each.name])\n"
        "            for each in monitor.ranking([candidate(*facts) for facts in found.values()])\n"
        "        )\n", RUN, STAYS, FAIL_AT_N,
    ),
    _mutant(
        "NaN wins", "policy/monitor.py",
        "        return number if math.isfinite(number) else None\n",
        '        return number if not math.isnan(number) else float("-inf")\n', MONITOR,
    ),
    _mutant(
        "infinity wins", "policy/monitor.py",
        "        return number if math.isfinite(number) else None\n",
        "        return number if not math.isnan(number) else None\n", MONITOR,
    ),
    _mutant("ties go to the newer one", "policy/monitor.py", "key=lambda each: each.order)\n            return\n",
            "key=lambda each: each.order, reverse=True)\n            return\n", MONITOR),
    _mutant(
        "weights that are NaN win", "policy/monitor.py",
        "        unhealthy = [each for each in made if each.is_unhealthy]\n", "        unhealthy = [each for each in made if False]\n",
        MONITOR, HEALTH,
    ),
    _mutant(
        "the last is the oldest", "run/run.py",
        "        resumable = (facts for facts in reversed(self._committed())", "        resumable = (facts for facts in (self._committed())",
        RUN,
    ),
    _mutant(
        "order by step alone", "core/manifest.py",
        "        return (self.step, self.sequence if self.weights_of is msgspec.UNSET else self.weights_of, self.sequence)\n",
        "        return (self.step, 0, 0)\n", RUN, STAYS, WEIGHTS,
    ),
    _mutant(
        "resume takes the unhealthy one", "training/resume.py",
        "    return [each for each in newest_first if each.is_healthy is not False] + unhealthy\n", "    return newest_first\n", HEALTH,
    ),
    _mutant(
        "resume takes what is damaged for the end", "training/resume.py",
        "            errors.append(error)\n            attempt.note_damaged(checkpoint.name)\n", "            raise\n", DAMAGE,
    ),
    _mutant(
        "nothing whole is left, so it starts anew", "training/resume.py",
        "    if errors or unlisted:\n", "    if False:\n", DAMAGE,
    ),
    _mutant(
        "the best is no reason to stay", "policy/retention.py",
        '        reasons[each.name].append(_place("best", place, keep.best))\n', '        _place("best", place, keep.best)\n', RETENTION,
    ),
    _mutant(
        "a damaged one fills a quota", "policy/retention.py",
        "    whole = [each for each in ordered if each.name not in broken]\n    counted, spare", "    whole = ordered\n    counted, spare",
        RETENTION,
    ),
)  # fmt: skip

BELIEVED = (
    _mutant(
        "the digest is not checked on load", "run/tensors.py",
        "        self._compare(read_digest(self._reader))\n", "        read_digest(self._reader)\n", DAMAGE, RESTORE,
    ),
    _mutant(
        "the digest is not checked on resume", "run/tensors.py",
        "        self._compare(hasher.text())\n", "        hasher.text()\n", DAMAGE,
    ),
    _mutant(
        "the digest is not checked when a link is copied", "run/commit.py",
        "    if hasher.text() != same.file.digest:\n", "    if False:\n", UNCHANGED, WEIGHTS,
    ),
    _mutant(
        "what was replaced is linked all the same", "run/commit.py",
        "            if linked.identity != same.reader.identity:\n", "            if False:\n", UNCHANGED,
    ),
    _mutant(
        "tensors that have changed are linked", "training/unchanged.py",
        "        if any(digest(array.data) != before.digests[key] for key, array in arrays.items()):\n",
        "        if not arrays:\n", UNCHANGED,
    ),
    _mutant(
        "the digest of state.json is not checked", "run/commit.py",
        "    if digest(data) != listed.digest:\n", "    if False:\n", DAMAGE,
    ),
    _mutant(
        "the digest of the manifest is not checked", "core/manifest.py",
        "    if not data.endswith(_digest_line(head)):\n", "    if not _DIGEST_LINE.match(data[-_DIGEST_LINE_BYTES:]):\n", MANIFEST,
    ),
    _mutant(
        "verify believes what it reads", "run/verify.py",
        "            if found == file.digest:\n", "            if found:\n", DAMAGE,
    ),
    _mutant(
        "sizes are not checked on load", "run/tensors.py",
        "        if self._reader.size != file.size:\n", "        if False:\n", DAMAGE,
    ),
    _mutant(
        "sizes are not checked when asked for the best", "run/verify.py",
        'store.size(f"{directory}/{file.name}") == file.size for', 'store.size(f"{directory}/{file.name}") != -1 for', DAMAGE, RUN,
    ),
    _mutant(
        "names in a manifest become paths", "core/manifest.py",
        "    if bad := [name for name in files if not is_file_name(name) or name == MANIFEST]:\n",
        "    if bad := [name for name in files if not name]:\n", MANIFEST, DAMAGE,
    ),
    _mutant(
        "a newer format is read as if it were ours", "core/manifest.py",
        "    if found and int(found[1]) > FORMAT:\n", "    if found and int(found[1]) < FORMAT:\n", MANIFEST,
    ),
    _mutant(
        "a manifest may say things twice", "core/manifest.py",
        "        strict.read(body, where=where, limit=MAX_MANIFEST_BYTES)\n", "", MANIFEST,
    ),
    _mutant(
        "the header has no limit", "core/tensorfile.py",
        "    if length > MAX_HEADER_BYTES:\n        raise _damaged(", "    if length > 1 << 62:\n        raise _damaged(", TENSORFILE,
    ),
    _mutant(
        "tensors may overlap", "core/tensorfile.py", "        if entry.start != position:\n", "        if entry.start > position:\n",
        TENSORFILE,
    ),
    _mutant(
        "a tensor may be named twice", "core/tensorfile.py", "        if name in seen:\n", "        if name in ():\n", TENSORFILE,
    ),
    _mutant(
        "an offset need not fit the shape", "core/tensorfile.py",
        "                if end - start == size:\n", "                if end >= start:\n", TENSORFILE,
    ),
    _mutant(
        "JSON may be as deep as it likes", "core/strict.py", "    if depth > max_depth:\n", "    if depth < 0:\n", STRICT,
    ),
    _mutant(
        "the last of two equal keys wins", "core/strict.py", "    if len(value) != len(pairs):\n", "    if False:\n", STRICT,
    ),
    _mutant(
        "a tree may be as deep as it likes", "core/tree.py",
        '    if depth > MAX_DEPTH:\n        raise malformed(path, f"it is nested', '    if depth < 0:\n        raise malformed(path, f"it is nested',
        TREE,
    ),
    _mutant(
        "a torn last line is read", "run/history.py",
        "        return whole\n\n\n@functools.cache",
        "        log.add(decode(begun or b'{\"event\":\"\",\"at\":\"\"}'))\n        return end\n\n\n@functools.cache", HISTORY,
    ),
    _mutant(
        "a row may be as long as it likes", "run/history.py",
        "                    if not 0 < len(line) <= MAX_LINE_BYTES:\n", "                    if not line:\n", LIMITS,
    ),
    _mutant(
        "an owner's record may be as long as it likes", "run/owner.py",
        "store.read(OWNER, MAX_OWNER_BYTES)", "store.read(OWNER, 1 << 40)", LIMITS,
    ),
    _mutant(
        "numbers are evaluated", "core/plain.py",
        '        case "$int", str() if _DECIMAL.match(content):\n            return int(content)\n',
        '        case "$int", str():\n            return eval(content)\n', "tests/house/test_load_paths.py", "tests/attacks/test_attacks.py",
    ),
    _mutant(
        "digits of other scripts are numbers", "core/plain.py",
        '_DECIMAL = re.compile(r"-?[0-9]{1,4300}\\Z")', '_DECIMAL = re.compile(r"-?\\d{1,4300}\\Z")', "tests/attacks/test_attacks.py",
    ),
    _mutant(
        "what differs is restored all the same", "run/restoring.py",
        "    if problems:\n        _verify(targets)\n", "    if problems == []:\n        _verify(targets)\n", RESTORE,
    ),
)  # fmt: skip

WRITERS_AND_ERRORS = (
    _mutant(
        "a live owner is not asked", "run/owner.py",
        "        if found is not None and _is_alive(found, store, watch):\n", "        if found is not None and found.pid < 0:\n", OWNER,
    ),
    _mutant(
        "the owner is not looked up before a commit", "run/attempt.py",
        "        self._ownership.check()\n        self._check_space(", "        self._check_space(",
        "tests/training/test_interrupted.py",
    ),
    _mutant(
        "a process number used again is the owner", "run/owner.py",
        "        return _started(owner.pid) == owner.started\n    watch", "        return _started(owner.pid) is not None\n    watch",
        OWNER, WRITERS,
    ),
    _mutant(
        "a beat goes over a successor", "run/owner.py",
        "                if found is None or self.describes(found):  # never over", "                if True:  # never over", WRITERS,
    ),
    _mutant(
        "the error of a save in the background is lost", "training/writer.py",
        "            self._error = error\n        finally:\n            self._job", "            pass\n        finally:\n            self._job",
        BACKGROUND, FAIL_AT_N,
    ),
    _mutant(
        "a program ends as if its last save had worked", "training/writer.py",
        "    errors = [error for writer in ours if (error := writer.drain()) is not None]\n",
        "    errors = [error for writer in ours if (error := writer.drain()) is not None][:0]\n", "tests/training/test_endings.py",
    ),
    _mutant(
        "a save that failed counts as saved", "training/saver.py",
        "            (epoch, _, step), (self._saved, self._saved_at) = self._saved, self._before\n",
        "            epoch, _, step = self._saved\n",
        GOING_BACK, BACKGROUND, FAIL_AT_N,
    ),
    _mutant(
        "space is not looked at beforehand", "run/attempt.py",
        "        if free is not None and free < needed:\n", "        if free is not None and free < 0:\n", "tests/faults/test_disk.py", "tests/run/test_run.py",
    ),
)  # fmt: skip

SNAPSHOTS = (
    _mutant("the tripwire is not looked at", "training/overlap.py", "            if now != before:\n", "            if False:\n", TRIPWIRES),
    _mutant(
        "samples of a copy are not compared", "training/overlap.py",
        "            if not self._samples[id(share.array)].startswith(found, first * _WORD_BYTES):\n", "            if not found:\n",
        TORN, OVERLAP,
    ),
    _mutant(
        "the barrier is missing", "training/overlap.py",
        "        watched.steps += 1\n        if self._armed is not None:\n            self.wait()\n", "        watched.steps += 1\n",
        TORN, OVERLAP,
    ),
    _mutant(
        "late arrays are copied without protection", "training/overlap.py",
        "        wires = [wire for array in shot.stream.late_arrays() if (wire := late.get(id(array))) is not None]\n",
        "        wires: list[_Wire] = []\n", TORN, OVERLAP,
    ),
    _mutant(
        "an optimizer without hooks is trusted", "training/overlap.py", "            if watched.steps:\n", "            if True:\n",
        OVERLAP, TORN,
    ),
    _mutant(
        "a step behind the hooks is not seen", "training/overlap.py",
        "            if wire.array.data.tobytes() != count:\n", "            if False:\n", TRIPWIRES,
    ),
    _mutant(
        "recall does not look whether the tensors are the same", "training/recall.py",
        "            if found is not None and _are_same(tensors, known):\n", "            if found is not None:\n", RECALL,
    ),
    _mutant(
        "recall does not look where the tensors lie", "training/recall.py",
        "        and live.are_at(tensors, known.places)\n", "", RECALL,
    ),
    _mutant(
        "a trace does not look at keys", "core/trace.py",
        "            if (tuple(value), tuple(map(type, value))) != self._keys:\n", "            if len(value) != len(self._keys[0]):\n", TRACE,
    ),
    _mutant(
        "a trace does not look at plain values", "core/trace.py",
        "            elif new is not old or type(new) not in _UNCHANGING:\n", "            elif type(new) is not type(old):\n", TRACE,
    ),
    _mutant(
        "a trace takes what can change in place for unchanged", "core/trace.py",
        "            elif new is not old or type(new) not in _UNCHANGING:\n", "            elif new is not old:\n", TRACE,
    ),
    _mutant(
        "the sequence lock of shared memory is not looked at", "training/found.py",
        "    if sequence % 2 or sequence == 0:\n", "    if sequence == 0:\n", TIER,
    ),
    _mutant(
        "the snapshot before stays valid while it is overwritten", "training/slot.py",
        '        self.sequence = next(self._count)\n        self._store_state(0, 0, digest(b""))\n',
        "        self.sequence = next(self._count)\n", TIER,
    ),
    _mutant(
        "the digest of the state in shared memory is not checked", "training/found.py",
        "    if digest(body).encode() != own_digest:\n", "    if not own_digest:\n", TIER,
    ),
    _mutant(
        "the bytes in shared memory are not checked", "training/found.py",
        "            if digest(file.data) != file.digest:\n", "            if not file.digest:\n", TIER,
    ),
    _mutant(
        "shared memory of others is believed", "training/found.py",
        "    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:\n", "    if found.st_uid < 0:\n", TIER,
    ),
    _mutant(
        "the table in shared memory has no limit", "training/found.py",
        "        and text_size <= table_size <= slot.MAX_TABLE_BYTES\n", "        and text_size <= table_size\n", TIER,
    ),
)  # fmt: skip

EXACTNESS_OF_RESUME = (
    _mutant(
        "random states are not restored", "training/progress.py",
        '        set_random_state(saved["random"], where=where)  # last: restoring objects may have drawn numbers',
        "        assert where", EXACTNESS, LOOP,
    ),
    _mutant(
        "the order of an epoch is drawn anew", "training/batches.py",
        '    set_random_state(saved["before"], where=where)\n', "", EXACTNESS, LOOP,
    ),
    _mutant(
        "random states are not set after the batches that are skipped", "training/progress.py",
        '            set_random_state(saved["random"], where=where)\n        self.length', "            assert where\n        self.length",
        EXACTNESS, LOOP,
    ),
    _mutant(
        "the position of a batch is off by one", "training/progress.py",
        'saved["place"], self.batch, where=where)', 'saved["place"], self.batch + 1, where=where)', EXACTNESS, LOOP,
    ),
    _mutant(
        "the step is counted twice", "training/progress.py",
        "        if self.is_iterating and not self.is_counted:\n", "        if self.is_iterating:\n", LOOP, EXACTNESS,
    ),
    _mutant(
        "other data are taken for the same", "training/batches.py",
        "    if None not in (before, now) and before != now:\n", "    if False:\n", TRIPWIRES,
    ),
    _mutant(
        "tied tensors come apart", "core/tree.py",
        "            if first != name:\n                return first\n", "", TREE, "tests/properties/test_tree_round_trip.py",
    ),
)  # fmt: skip

GROUPS = {
    "Durability": DURABILITY,
    "Order": ORDER,
    "Best, last, and what stays": BEST_AND_LAST,
    "What is believed": BELIEVED,
    "Writers and their errors": WRITERS_AND_ERRORS,
    "Snapshots": SNAPSHOTS,
    "Exactness of resume": EXACTNESS_OF_RESUME,
}
MUTANTS = tuple(mutant for group in GROUPS.values() for mutant in group)
