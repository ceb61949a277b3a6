"""The run folder around training: its lock, its checks against the config, its notes for job scripts."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base import config as configs
from cfpretrain.base import files, runtime
from cfpretrain.base.config import Config, to_plain, to_yaml
from cfpretrain.base.console import UserError, explaining, phase, say
from cfpretrain.base.stopping import leave_before_training
from cfpretrain.data.compatibility import check_autoencoder, check_infos
from cfpretrain.data.loader import order_fingerprint
from cfpretrain.data.mosaic import __version__ as streaming_version
from cfpretrain.data.online import TrainingData, open_training_data
from cfpretrain.run.build import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOCK_FILE,
    REQUEUE_FILE,
    SAMPLES,
    SUMMARY_FILE,
    TOKENIZER_FILE,
    Summary,
    check_relative,
    choose_blocks,
    make_autoencoder,
    make_store,
    make_tokenizer,
    read_summary,
)
from cfpretrain.run.checkpoint_store import CheckpointStore
from cfpretrain.run.sequences import captions_at_hand
from cfpretrain.run.state import TrainingState, changes, read_state
from cfpretrain.run.tensor_files import DamagedCheckpointError
from cfpretrain.training.step import Counters

_LOCK_SECONDS = 60.0  # a run that was asked to stop ends within it
_MOST_STEPS_LISTED = 1000


def write_requeue(folder: Path, reason: str) -> None:
    """Tells job scripts that the same command should be run again; any rank may, since rank 0 may be lost."""
    files.replace(folder / REQUEUE_FILE, f"{reason}\n")


def leave_at_start(folder: Path) -> None:
    """Ends this process at a request to stop before the first step, when all that it would save is saved already."""
    with suppress(OSError):
        if folder.is_dir():
            write_requeue(folder, "stopped before its first step")
    leave_before_training()


def remove_requeue(folder: Path) -> None:
    """Tells job scripts that the run is complete, or that running it again would not help."""
    if runtime.rank() == 0:
        with suppress(OSError):  # a disk that became read-only is reported elsewhere
            files.remove(folder / REQUEUE_FILE)


def check_moved(paths: Sequence[str], config: Config) -> None:
    """Refuses the config of a moved or copied run that still names the old folder, where another run would train.

    `config` was read from these files and the command line.
    """
    for file in (Path(path).expanduser() for path in paths):
        is_of_run = configs.is_recorded(file) and (file.parent / CHECKPOINTS).is_dir()
        if not is_of_run or configs.load_recorded(file).run.folder != config.run.folder:
            continue  # the command line may say where
        if os.path.realpath(config.run.folder) != os.path.realpath(file.parent):
            raise UserError(
                f"run.folder: {file} is of the run in {file.parent}, which was moved or copied, and says "
                f"{config.run.folder} in {Path.cwd()}; give run.folder={file.parent} to train this one, or another"
            )


def prepare_folder(config: Config, device: torch.device) -> TrainingData:
    """Checks what a run reads and where it writes, and locks the run folder, in which nothing is recorded yet.

    All ranks call it, before the engine is built. Returns the data, opened on the device.
    """
    folder = Path(config.run.folder)
    with runtime.together():
        choose_blocks(config, device.type)
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        if not nearest.is_dir():
            raise UserError(_unwritable(folder, f"{nearest} is no folder"))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(_unwritable(folder, f"no permission to write in {nearest}"))
        data = _check_inputs(config, device)
        if runtime.rank() == 0:
            captions = captions_at_hand(config)
            if captions.unknown:
                say(f"WARNING: {captions}: a model learns such texts without it")
        with explaining(_unwritable(folder)):
            files.make_folder(folder, follow=True)
            take(folder)
            remove_requeue(folder)
            for place in (folder.resolve(), folder.resolve() / SAMPLES) if runtime.rank() == 0 else ():
                files.remove_leftovers(place)
    return data


def _unwritable(folder: Path, reason: str = "{reason}") -> str:
    return (
        f"run.folder: {folder} cannot be written ({reason}); choose another with run.folder=PATH or change its "
        "permissions"
    )


def record_config(config: Config) -> None:
    """Writes the resolved config and the tokenizer into the run folder, and reports changes. All ranks call it."""
    folder = Path(config.run.folder)
    with runtime.together(), explaining(_unwritable(folder)):
        if runtime.rank() == 0:
            _say_changes(folder, config)
            files.replace(folder / CONFIG_FILE, to_yaml(config))
            tokenizer = make_tokenizer(config)
            if tokenizer is not None:
                files.replace(folder / TOKENIZER_FILE, tokenizer.to_json())


def _say_changes(folder: Path, config: Config) -> None:
    """Names the settings that differ from those of the latest checkpoint."""
    latest = _newest_readable(make_store(config))
    if latest is not None and latest[1].has_record:
        since, before = f"step {latest[1].step}", latest[1].config
    elif (folder / CONFIG_FILE).is_file():
        try:
            since, before = "the last start", to_plain(configs.load_recorded(folder / CONFIG_FILE))
        except UserError:  # of an older version, or damaged: it is replaced
            return
    else:
        return
    for key, (was, value) in changes(before, to_plain(config)).items():
        say(f"changed since {since}: {key} from {was} to {value}")


_locks: dict[Path, int] = {}


def take(folder: Path) -> None:
    """Locks the run folder for the life of this process; rank 0 does, and waits a while for another run's end."""
    if runtime.rank() != 0 or folder.resolve() in _locks:
        return
    deadline = time.monotonic() + _LOCK_SECONDS
    lock = files.open_lock(folder / LOCK_FILE)
    # Of a copy by hard links (`cp -al`): it and the original run one at a time, and the text is any file's.
    is_shared = os.fstat(lock).st_nlink > 1
    with phase(f"waiting for the run that uses {folder}", announce=False):
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                holder = os.pread(lock, 256, 0).decode(errors="replace").strip() or "of an unknown process"
                fix = f"; or, where this is a copy of that run by hard links, remove {folder / LOCK_FILE}" * is_shared
                raise UserError(
                    f"run.folder: {folder} is in use by another run ({holder}); end that one, or choose another "
                    f"run.folder{fix}"
                )
            time.sleep(0.2)
    if not is_shared:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _locks[folder.resolve()] = lock


def _try_lock(descriptor: int) -> bool:
    try:
        # A record lock: a loader's worker, forked from this process and left behind by its death, does not hold it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _check_inputs(config: Config, device: torch.device) -> TrainingData:
    """The data of a run; UserError where it cannot be read, or the run was trained on other."""
    for address in config.data.shards:
        check_relative("data.shards", address)
    if config.evaluation.every_steps:
        check_relative("evaluation.reference", config.evaluation.reference)
        if config.evaluation.captions:
            check_relative("evaluation.captions", config.evaluation.captions)
    data, tokenizer = open_training_data(config, device), make_tokenizer(config)
    infos = data.latents
    check_infos(infos, config)
    if runtime.rank() == 0 and config.data.autoencoder and not data.encodings:
        # Another one than made the latents would decode them to something else.
        autoencoder = make_autoencoder(config, torch.device("cpu"))
        check_autoencoder(infos[0], autoencoder.fingerprint, autoencoder.shift, autoencoder.scale, "data.autoencoder")
    found = _newest_readable(make_store(config))
    if found is None:
        return data
    latest, saved = found
    saved.check_config(to_plain(config), str(latest))
    if saved.autoencoder not in ("", infos[0].autoencoder):
        key = "data.autoencoder" if data.encodings else "data.shards"
        raise UserError(
            f"{key}: expected latents of the autoencoder {saved.autoencoder}, as checkpoint {latest} was trained on, "
            f"got those of {infos[0].autoencoder}; set {key} as it was or choose another run.folder"
        )
    # An imported checkpoint has none: it is at the beginning of an epoch of any data.
    if saved.data_fingerprint and saved.data_fingerprint != order_fingerprint(config, data.folders):
        raise UserError(
            f"data.shards: checkpoint {latest} was trained on other shards than {', '.join(config.data.shards)} "
            "(latents are others than the images that they were made of), or with other data.repeat, "
            "data.num_canonical_nodes or data.shuffle_block_size, so its place in the data means nothing here; "
            "set these as they were or choose another run.folder"
        )
    if tokenizer is not None and saved.tokenizer not in ("", tokenizer.fingerprint):
        raise UserError(
            f"data.tokenizer: expected the one that checkpoint {latest} was trained with, a copy of which is "
            f"{Path(config.run.folder) / TOKENIZER_FILE}, got another in {config.data.tokenizer}; give that one"
        )
    if saved.seed != config.run.seed:
        raise UserError(
            f"run.seed: expected {saved.seed}, the seed of checkpoint {latest}, got {config.run.seed}; "
            "another seed is another order of the data: choose another run.folder"
        )
    return data


def _newest_readable(store: CheckpointStore) -> tuple[Path, TrainingState] | None:
    for path in store.candidates():
        try:
            return path, read_state(path)
        except DamagedCheckpointError:
            continue  # said where it is resumed from
    return None


def finished_step(config: Config) -> int | None:
    """The step at which this run folder's run was completed under this config; None where there is work left."""
    step = None
    with runtime.together():
        summary = read_summary(Path(config.run.folder)) if runtime.rank() == 0 else None
        if summary is not None and is_done(config, int(summary["num_steps"]), float(summary["train_seconds"])):
            latest = _newest_readable(make_store(config))
            if latest is None or latest[1].step >= summary["num_steps"]:  # else it was set back by hand
                step = int(summary["num_steps"])
    agreed: int | None = runtime.gather(step)[0]  # one rank's view of the folder decides
    return agreed


def is_done(config: Config, step: int, train_seconds: float) -> bool:
    """Whether training has come to the end that the config sets."""
    limit = config.train.max_train_seconds
    return step >= config.train.num_steps or (limit > 0 and train_seconds >= limit)


def package_versions() -> dict[str, str]:
    """Of the packages that decide a run's numbers."""
    return runtime.package_versions("torch", "deepspeed") | {"streaming": streaming_version}


def write_summary(config: Config, at: Counters, rows: Sequence[Mapping[str, Any]], peak_rss_mb: float) -> None:
    """Writes the summary of a complete run, from its end and the rows of its metrics; rank 0 calls it."""
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 20) :]
    summary: Summary = {
        "world_size": runtime.world_size(),
        "zero_stage": config.engine.zero_stage,
        "engine_precision": config.engine.precision,
        "num_steps": at.step,
        "num_skipped_steps": at.num_skipped,
        "num_rewinds": at.num_rewinds,
        "skipped_steps": [row["step"] for row in rows if "skipped" in row][:_MOST_STEPS_LISTED],
        "train_seconds": at.train_seconds,
        "images_per_second": at.step * config.train.global_batch_size / at.train_seconds,
        "loss_first": losses[0] if losses else None,
        "loss_last": sum(tail) / len(tail) if losses else None,
        "peak_rss_mb": peak_rss_mb,
        "versions": package_versions(),
    }
    folder = Path(config.run.folder)
    files.replace(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    remove_requeue(folder)


def tracker_run_id(saved: TrainingState | None, folder: Path, wandb: str = "auto") -> str | None:
    """The wandb run to go on with; None begins one, as for a new run (nothing was `saved`) or a copy of a run."""
    run_id = saved.wandb_run_id if saved else None
    if saved is None or run_id is None or wandb == "disabled" or not saved.working_folder or runtime.rank() != 0:
        return run_id
    before = Path(saved.working_folder, str(saved.config.get("run", {}).get("folder", "")))
    with suppress(OSError, UserError):  # a run that cannot be read at its earlier place does not go on there
        theirs = _newest_readable(CheckpointStore(before / CHECKPOINTS, keep_last=1, keep_every_steps=0))
        if theirs is not None and theirs[1].wandb_run_id == run_id and not before.samefile(folder):
            say(f"{folder} is a copy of {before}, to which wandb run {run_id} belongs: it begins one of its own")
            return None
    return run_id
