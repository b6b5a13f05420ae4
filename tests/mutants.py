"""Breaks the safety code on purpose, one place at a time, in a copy, and runs the tests that should notice.

    python tests/mutants.py [WORD ...]     # all, or those whose name contains a word

Prints a table; the exit code is 1 if a mutant survives or the tests fail without one.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    """Occurs exactly once in the file."""
    new: str
    tests: str
    """What pytest is given: files or nodes, with spaces between them."""


CHECKPOINT = "tests/engine/test_checkpoint.py"
PLANTS = "tests/reliability/test_plants.py"
STEP = "tests/engine/test_step.py"
LOADER = "tests/data/test_loader.py"
COMPOSE = "tests/cli/test_compose.py"
GROUP = "tests/test_distributed.py"
IMAGES = "tests/data/test_images.py"
TILED = "tests/data/test_tiled.py"
MUTANTS = [
    Mutant(
        "what an edge leaves of an object is an object",
        "retina/data/tiled.py",
        "KEPT = 0.5",
        "KEPT = 0.0",
        f"{TILED}::test_half_of_an_object_is_one_and_less_is_ignored",
    ),
    Mutant(
        "all crops of an image are the same",
        "retina/data/tile_dataset.py",
        'stable_hash(seed, "crop")',
        "0",
        f"{TILED}::test_the_order_of_crops_is_exact_from_any_step",
    ),
    Mutant(
        "an unproved export is written",
        "retina/export/proof.py",
        "if not self.faults or len(self.faults) <= tolerance.unmatched * total:",
        "if True:",
        "tests/export/test_write.py::test_where_they_part_is_told",
    ),
    Mutant(
        "files are not synced",
        "retina/files.py",
        "os.fsync(handle.fileno())",
        "pass",
        f"{CHECKPOINT}::test_everything_is_on_the_disk_before_it_is_believed",
    ),
    Mutant(
        "folders are not synced",
        "retina/files.py",
        "        os.fsync(descriptor)\n",
        "        pass\n",
        f"{CHECKPOINT}::test_everything_is_on_the_disk_before_it_is_believed",
    ),
    Mutant(
        "a checkpoint is written under its final name",
        "retina/engine/checkpoint.py",
        'temporary = folder / f".{final.name}.tmp"',
        "temporary = final",
        f"{CHECKPOINT}::test_a_kill_at_any_call_of_a_save_leaves_a_valid_checkpoint_and_no_other",
    ),
    Mutant(
        "a checkpoint is not read back",
        "retina/engine/checkpoint.py",
        "if fault := find_fault(temporary):",
        "if fault := None:",
        f"{CHECKPOINT}::test_a_disk_that_gives_back_other_bytes_is_not_believed",
    ),
    Mutant(
        "the one before is removed first",
        "retina/engine/checkpoint.py",
        "older[max(0, keep - 1) :]",
        "older[max(0, keep - 2) :]",
        f"{CHECKPOINT}::test_layout_and_rotation "
        f"{CHECKPOINT}::test_a_kill_at_any_call_of_a_save_leaves_a_valid_checkpoint_and_no_other",
    ),
    Mutant(
        "hashes are not compared",
        "retina/engine/checkpoint.py",
        ".hexdigest() != digest:",
        '.hexdigest() == "":',
        f"{CHECKPOINT}::test_every_flipped_bit_and_every_cut_is_noticed_and_the_one_before_is_used",
    ),
    Mutant(
        "the seal of the manifest is not compared",
        "retina/engine/checkpoint.py",
        'if not seal or digest != hashlib.sha256(lines).hexdigest().encode() + b"\\n":',
        "if not seal:",
        "tests/engine/test_manifest.py",
    ),
    Mutant(
        "NaN is saved",
        "retina/engine/checkpoint.py",
        "    _refuse_non_finite(final, states, state)\n",
        "",
        f"{CHECKPOINT}::test_values_that_are_not_finite_are_never_saved",
    ),
    Mutant(
        "NaN is learned from",
        "retina/engine/step.py",
        "updated = (sums.sum() + norm).isfinite()",
        "updated = torch.ones((), dtype=torch.bool)",
        f"{STEP}::test_a_number_that_is_not_finite_changes_nothing",
    ),
    Mutant(
        "running statistics keep NaN",
        "retina/engine/step.py",
        "torch.where(updated, distributed.flatten(statistics), before)",
        "distributed.flatten(statistics)",
        f"{STEP}::test_a_number_that_is_not_finite_changes_nothing",
    ),
    Mutant(
        "target boxes are not looked at",
        "retina/engine/step.py",
        "sums += 0 * batch.targets.boxes.sum()",
        "pass",
        f"{STEP}::test_a_number_that_is_not_finite_changes_nothing",
    ),
    Mutant(
        "ranks do not tell each other",
        "retina/distributed.py",
        "all_reduce_sum(counts).tolist()",
        "counts.tolist()",
        f"{STEP}::test_what_spoils_one_rank_is_known_to_all",
    ),
    Mutant(
        "a full disk ends the run",
        "retina/engine/checkpointer.py",
        "except OSError as fault:",
        "except EOFError as fault:",
        "tests/engine/test_checkpointer.py",
    ),
    Mutant(
        "nobody complains at the end",
        "retina/engine/checkpointer.py",
        "for what, reason in self.missing.items():",
        "for what, reason in ():",
        "tests/engine/test_checkpointer.py",
    ),
    Mutant(
        "a failed checkpoint is not tried again",
        "retina/engine/loop.py",
        'retry="checkpoint" in checkpointer.missing',
        "retry=False",
        "tests/engine/test_fit.py",
    ),
    Mutant(
        "best weights that failed are not tried again",
        "retina/engine/loop.py",
        "checkpointer.write_owed()",
        "pass",
        "tests/engine/test_fit.py",
    ),
    Mutant(
        "best weights that are owed die with the process",
        "retina/engine/checkpointer.py",
        '"best": self._best}',
        '"best": None}',
        "tests/engine/test_checkpointer.py",
    ),
    Mutant(
        "a run without its best weights is called finished",
        "retina/engine/checkpointer.py",
        "if finished and self.folder",
        "if self.folder is self",
        "tests/engine/test_checkpointer.py",
    ),
    Mutant(
        "training goes on for ever without saving",
        "retina/engine/checkpointer.py",
        "- began < most * 60:",
        "- began < most * 60 + 1e9:",
        "tests/engine/test_checkpointer.py",
    ),
    Mutant(
        "a run folder that was moved is made anew",
        "retina/engine/checkpointer.py",
        "                    self._place.check()",
        "                    pass",
        "tests/reliability/test_moved.py",
    ),
    Mutant(
        "another folder of the same name and number is taken for the run's",
        "retina/files.py",
        "self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)",
        "pass",
        "tests/reliability/test_moved.py -k place",
    ),
    Mutant(
        "a checkpoint beyond the end is trained on",
        "retina/engine/loop.py",
        "    plan.refuse_beyond(progress.step)\n",
        "",
        "tests/engine/test_fit.py",
    ),
    Mutant(
        "a launcher's copy of Ctrl-C quits",
        "retina/cli/signals.py",
        " and time.monotonic() - since > FORWARDED_WITHIN:",
        ":",
        "tests/cli/test_signals.py",
    ),
    Mutant(
        "no lock",
        "retina/files.py",
        "fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/cli/test_run_folder.py",
    ),
    Mutant(
        "links are followed",
        "retina/files.py",
        '*(() if follow else ("O_NOFOLLOW",))',
        "*()",
        f"{PLANTS} -k session",
    ),
    Mutant(
        "pipes are written into",
        "retina/files.py",
        "if stat.S_ISREG(os.fstat(descriptor).st_mode):",
        "if 1:",
        f"{PLANTS}::test_a_run_that_cannot_add_to_its_files_is_refused",
    ),
    Mutant(
        "folders that are links are entered",
        "retina/files.py",
        "if not stat.S_ISDIR(folder.lstat().st_mode):",
        "if not folder.is_dir():",
        f"{PLANTS} -k session",
    ),
    Mutant(
        "logs add to their second name",
        "retina/files.py",
        "st_nlink > 1",
        "st_nlink > 9",
        f"{PLANTS}::test_a_second_name_of_a_log_keeps_what_it_had",
    ),
    Mutant(
        "locks write to their second name",
        "retina/cli/run_folder.py",
        "st_nlink > 1",
        "st_nlink > 9",
        f"{PLANTS} -k second",
    ),
    Mutant(
        "a temporary file that was left is in the way",
        "retina/files.py",
        "        temporary.unlink(missing_ok=True)\n        write_synced",
        "        write_synced",
        "tests/test_files.py",
    ),
    Mutant(
        "a run adds to what a link leads to",
        "retina/cli/run_folder.py",
        "  _refuse_links(folder)\n",
        "  pass\n",
        f"{PLANTS}::test_a_run_that_cannot_add_to_its_files_is_refused",
    ),
    Mutant(
        "Hydra follows a planted link",
        "retina/cli/sweep.py",
        'Path(folder, "multirun.yaml").unlink(missing_ok=True)',
        "pass",
        f"{PLANTS} -k swept",
    ),
    Mutant(
        "a terminal that cannot show a name ends the program",
        "retina/printing.py",
        'encode(encoding, "backslashreplace")',
        "encode(encoding)",
        "tests/test_printing.py",
    ),
    Mutant("lines are printed as they are", "retina/printing.py", "plain(text)", "text", "tests/test_printing.py"),
    Mutant(
        "a reader who has gone is a fault",
        "retina/printing.py",
        "    except BrokenPipeError:\n        mute(stream)",
        "    except EOFError:\n        mute(stream)",
        "tests/test_printing.py",
    ),
    Mutant(
        "a stream that is closed gives its number to the next file",
        "retina/printing.py",
        "            os.open(os.devnull, os.O_RDWR)",
        "            pass",
        "tests/test_printing.py",
    ),
    Mutant(
        "a full disk behind what is printed is a traceback",
        "retina/printing.py",
        "    except OSError as fault:\n        say(",
        "    except EOFError as fault:\n        say(",
        "tests/test_printing.py",
    ),
    Mutant(
        "aliases of YAML files may stand for anything",
        "retina/cli/config_files.py",
        "size(root) - len(sizes) >= MOST_REPEATED:",
        "size(root) < 0:",
        f"{COMPOSE}::test_configs_of_ones_own",
    ),
    Mutant(
        "interpolations may stand for anything",
        "retina/cli/config_files.py",
        "            cls.spent += _size(value)\n",
        "",
        f"{COMPOSE}::test_a_few_lines_that_stand_for_much",
    ),
    Mutant(
        "lists of defaults may load any number of files",
        "retina/cli/config_files.py",
        "        self.loaded += 1\n",
        "",
        f"{COMPOSE}::test_a_few_lines_that_stand_for_much",
    ),
    Mutant(
        "Hydra reads files as it likes",
        "retina/cli/config_files.py",
        "SourcesRegistry.instance().register(FileConfigSource)\n",
        "",
        f"{COMPOSE}::test_configs_of_ones_own",
    ),
    Mutant(
        "what a header implies of other packages' parts is built at once",
        "retina/model/header.py",
        '        with torch.device("meta"), _few_layers():',
        "        with _few_layers():",
        "tests/model/test_header.py -k without_memory",
    ),
    Mutant(
        "a header may imply any number of layers",
        "retina/model/header.py",
        "        if made > MOST_LAYERS:",
        "        if made > 10**6:",
        "tests/model/test_header.py -k without_memory",
    ),
    Mutant(
        "a header may imply buffers of any size",
        "retina/model/header.py",
        "check(buffers <= MOST_BUFFERS,",
        "check(True,",
        "tests/model/test_header.py -k without_memory",
    ),
    Mutant(
        "a file system without locks is a fault",
        "retina/files.py",
        "if fault.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):",
        "if fault.errno == 0:",
        "tests/reliability/test_errors_of_disks.py",
    ),
    Mutant(
        "every disk that fails is a full one",
        "retina/files.py",
        "_ADVICE.get(fault.errno or 0,",
        "_ADVICE.get(errno.ENOSPC,",
        "tests/reliability/test_errors_of_disks.py",
    ),
    Mutant(
        "any record of a journal is believed",
        "retina/cli/journal.py",
        "                _check_batch(batch, num_classes)\n",
        "",
        "tests/cli/test_journal.py::test_changed_journals_are_done_again_or_refused",
    ),
    Mutant(
        "any claim of an output folder is believed",
        "retina/cli/journal.py",
        "check_type(digests, list[str], name)",
        "check_type(digests, list, name)",
        "tests/cli/test_journal.py::test_changed_journals_are_done_again_or_refused",
    ),
    Mutant(
        "torchrun's variables may be anything",
        "retina/distributed.py",
        '    if not re.fullmatch("[0-9]{1,9}", value):',
        "    if not value:",
        f"{GROUP}::test_what_torchrun_sets_is_a_number",
    ),
    Mutant(
        "a record with a key that is there twice is believed",
        "retina/schema.py",
        "if len(values) != len(pairs):",
        "if False:",
        "tests/cli/test_journal.py tests/engine/test_logging.py",
    ),
    Mutant(
        "every setting is harmless",
        "retina/cli/run_folder.py",
        "if one.key not in HARMLESS and not _trains_longer(one)]",
        "if one.key in ()]",
        "tests/cli/test_run_folder.py",
    ),
    Mutant(
        "left-over temporary files are not removed at start",
        "retina/cli/run_folder.py",
        "temporary_of(folder / name).unlink(missing_ok=True)",
        "pass",
        "tests/cli/test_run_folder.py",
    ),
    Mutant(
        "a folder of another program is taken for a run",
        "retina/cli/run_folder.py",
        "    return values.keys() >= EARLIER and",
        "    return values.keys() >= {'name'} or",
        "tests/cli/test_run_folder.py",
    ),
    Mutant(
        "an overwritten run is gone before the new one has saved",
        "retina/cli/run_folder.py",
        "(_set_aside if holds_work(folder) else _remove)(folder)",
        "_remove(folder)",
        "tests/cli/test_run_folder.py",
    ),
    Mutant(
        "a run is set aside under its final name",
        "retina/cli/run_folder.py",
        '    moving = folder / f"{REPLACED}.tmp"\n    make_folder(moving, within=folder)',
        "    moving = folder / REPLACED\n    make_folder(moving, within=folder)",
        "tests/cli/test_run_folder.py",
    ),
    Mutant(
        "nothing at all to learn is trained on",
        "retina/cli/data.py",
        "grave += check_objects(annotations)",
        'grave += check_objects(annotations) if config.on_error == "stop" else []',
        "tests/cli/test_data.py::test_nothing_annotated_stops",
    ),
    Mutant(
        "a clock set back hides steps",
        "retina/tracking/tensorboard.py",
        "max(0.0, _latest(folder) + 1e-3 - time.time())",
        "0.0",
        "tests/tracking/test_board.py::test_a_clock_set_back_hides_nothing",
    ),
    Mutant(
        "labels follow the file instead of ascending ids",
        "retina/data/coco.py",
        "for category_id in sorted(name_of)]",
        "for category_id in name_of]",
        "tests/data/test_coco.py",
    ),
    Mutant(
        "file names may lead anywhere",
        "retina/data/paths.py",
        "    if not _UNUSUAL.search(name):\n",
        "    if True:\n",
        "tests/data/test_paths.py tests/reliability/test_malformed.py",
    ),
    Mutant(
        "links may lead anywhere",
        "retina/data/paths.py",
        "            if not inside(target):\n",
        "            if False:\n",
        "tests/data/test_paths.py tests/reliability/test_malformed.py",
    ),
    Mutant(
        "an allowed name is an allowed object",
        "retina/plugins.py",
        "    if not _is_own(thing, allowed):\n",
        "    if False:\n",
        f"{COMPOSE}::test_what_only_pretends_to_be_at_home_is_refused "
        f"{COMPOSE}::test_targets_outside_the_allowed_are_refused",
    ),
    Mutant(
        "box deltas are not clamped",
        "retina/ops/boxes.py",
        ".clamp(max=LARGEST_LOG_SCALE)",
        "",
        "tests/ops/test_coding.py",
    ),
    Mutant(
        "workers heed Ctrl-C",
        "retina/data/workers.py",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "pass",
        f"{LOADER}::test_workers_ignore_the_signals_that_stop_a_run",
    ),
    Mutant(
        "a worker that hangs is no fault",
        "retina/data/workers.py",
        "            raise late()\n",
        "            break\n",
        f"{LOADER}::test_a_worker_that_hangs_is_not_waited_for_without_end",
    ),
    Mutant(
        "a signal waits for a worker that hangs",
        "retina/data/workers.py",
        "            raise StoppedError(number)\n",
        "            pass\n",
        f"{LOADER}::test_a_worker_that_hangs_between_epochs",
    ),
    Mutant(
        "a wait in C is deaf although there is nothing to save",
        "retina/cli/signals.py",
        "                if self._quits():\n",
        "                if False:\n",
        "tests/cli/test_signals.py",
    ),
    Mutant(
        "a signal to a forked process is one to its parent",
        "retina/cli/signals.py",
        "        signal.set_wakeup_fd(-1)\n",
        "        pass\n",
        "tests/cli/test_signals.py",
    ),
    Mutant(
        "a process that waits too long takes the others to be gone",
        "retina/distributed.py",
        'if re.search(r"time[d -]*out", reason, re.I):',
        "if False:",
        f"{GROUP}::test_a_process_that_waits_too_long_names_the_setting",
    ),
    Mutant(
        "a JPEG has as many scans as it likes",
        "retina/data/metered.py",
        "            if self._scans > self._most_scans:\n",
        "            if False:\n",
        f"{IMAGES}::test_the_scans_of_a_jpeg_are_bounded_by_the_pixels_that_they_go_over",
    ),
    Mutant(
        "a header has no end",
        "retina/data/metered.py",
        "            if self._reads > _HEADER_READS or self._bytes > self._room:\n",
        "            if False:\n",
        f"{IMAGES}::test_headers_have_an_end",
    ),
    Mutant(
        "a batch in the making holds large images",
        "retina/data/transforms.py",
        "        if image.size > _DEFERRED:\n",
        "        if False:\n",
        f"{LOADER}::test_a_batch_in_the_making_holds_no_large_images",
    ),
    Mutant(
        "images in memory are counted, not measured",
        "retina/cli/sources.py",
        "        if group and held + pixels > max_pixels:\n",
        "        if False:\n",
        "tests/cli/test_sources.py::test_images_in_memory_are_bounded_by_their_pixels",
    ),
    Mutant(
        "escape sequences reach the terminal",
        "retina/errors.py",
        'return plain(": ".join(part for part in (self.key, super().__str__()) if part))',
        'return ": ".join(part for part in (self.key, super().__str__()) if part)',
        "tests/test_printing.py::test_the_text_of_a_fault_is_one_harmless_line",
    ),
]


FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["albumentations", "hydra", "matplotlib", "pytest", "torch", "torchvision"])


def survives(copy: Path, tests: str, limit: float | None = None) -> bool:
    """Whether these tests pass in the copy: in a fork of a process that has imported what takes long. Tests that take
    longer than `limit` seconds hang, which is noticed too: they would wait for a quarter of an hour, and fail then."""
    process = FORKED.Process(target=run_tests, args=(copy, tests))
    process.start()
    process.join(limit)
    hangs = process.is_alive()
    assert process.pid
    with suppress(ProcessLookupError):  # what the tests of a mutant leave behind
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return not hangs and process.exitcode == 0


def run_tests(copy: Path, tests: str) -> None:
    import pytest

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what runs in the background
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))]
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests.split()])
    os._exit(code)  # without waiting for a worker that hangs


def main(words: Sequence[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "retina"
        for name in ("retina", "tools", "configs", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        limits, failed = {}, []
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            start = time.monotonic()
            if not survives(copy, tests):
                failed.append(tests)
                print(f"fails without any mutant: {tests}", flush=True)
            limits[tests] = 60 + 5 * (time.monotonic() - start)
        alive = 0
        for mutant in chosen:
            file = copy / mutant.file
            sound = file.read_text()
            assert sound.count(mutant.old) == 1, f"{mutant.name}: {mutant.file} does not hold the text exactly once"
            file.write_text(sound.replace(mutant.old, mutant.new))
            alive += (lives := survives(copy, mutant.tests, limits[mutant.tests]))
            file.write_text(sound)
            print(f"{'SURVIVES' if lives else 'caught':<9} {mutant.name}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants caught")
    return 1 if alive or failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
