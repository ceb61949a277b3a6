"""The run folder around training: who may write in it, what in it fits the config, what it tells job scripts."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from cfpretrain.base import config as configs
from cfpretrain.base import files, runtime
from cfpretrain.base.config import Config, to_plain, to_yaml
from cfpretrain.base.console import UserError, leave_before_training, phase, say
from cfpretrain.data.loader import open_folders, order_fingerprint
from cfpretrain.data.shards import LatentsInfo, check_autoencoder, check_infos
from cfpretrain.run.build import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOCK_FILE,
    REQUEUE_FILE,
    SAMPLES,
    check_relative,
    choose_blocks,
    make_autoencoder,
    make_store,
    read_summary,
)
from cfpretrain.run.checkpoint import CheckpointStore
from cfpretrain.run.state import TrainingState, changes, read_state
from cfpretrain.run.tensor_files import DamagedCheckpointError

_LOCK_SECONDS = 60.0  # a run that was asked to stop ends within it


def write_requeue(folder: Path, reason: str) -> None:
    """Leaves word for job scripts that the same command should be run again; any rank may, rank 0 may be lost."""
    files.replace(folder / REQUEUE_FILE, f"{reason}\n")


def leave_at_start(folder: Path) -> NoReturn:
    """Ends this process at a request to stop before the first step, where what it would save is saved already."""
    with suppress(OSError):
        if folder.is_dir():
            write_requeue(folder, "stopped before its first step")
    leave_before_training()


def remove_requeue(folder: Path) -> None:
    """Takes that word back: the run is complete, or running it again would not help."""
    if runtime.rank() == 0:
        with suppress(OSError):  # a disk that became read-only has more to say elsewhere
            files.remove(folder / REQUEUE_FILE)


def check_moved(paths: Sequence[str], config: Config) -> None:
    """Refuses the config of a moved or copied run that still says where it was: the original would train, or a new run.

    Args:
        paths: files that the config was read from.
        config: as it was read from them and the command line.

    Raises:
        UserError: names the folder that was hardly meant.
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


def prepare_folder(config: Config, device: torch.device) -> None:
    """Checks what a run reads and where it writes, and takes the run folder; what is recorded in it stays as it was.

    It takes no seconds of building an engine. All ranks call it.

    Raises:
        UserError: on all ranks: the shards do not fit the config, the latest checkpoint is of another run, the
            folder cannot be written, or the device cannot do what the config asks for.
    """
    folder = Path(config.run.folder)
    with runtime.together():
        choose_blocks(config, device.type)
        _check_writable(folder)
        _check_inputs(config)
        try:
            files.make_folder(folder, follow=True)
            take(folder)
            remove_requeue(folder)
            if runtime.rank() == 0:
                for place in (folder.resolve(), folder.resolve() / SAMPLES):
                    files.remove_leftovers(place)
        except OSError as error:
            raise _unwritable(folder, error.strerror or str(error)) from error


def record_config(config: Config) -> None:
    """Puts the resolved config into the run folder and says what it changes: what follows trains. All ranks call it.

    Raises:
        UserError: on all ranks: it cannot be written.
    """
    folder = Path(config.run.folder)
    with runtime.together():
        if runtime.rank() == 0:
            _say_changes(folder, config)
            try:
                files.replace(folder / CONFIG_FILE, to_yaml(config))
            except OSError as error:
                raise _unwritable(folder, error.strerror or str(error)) from error


def _say_changes(folder: Path, config: Config) -> None:
    """Names the knobs that are set otherwise than when the latest checkpoint was written."""
    latest = _newest_readable(make_store(config))
    if latest is not None and latest[1].has_record:
        since, before = f"step {latest[1].step}", latest[1].config
    elif (folder / CONFIG_FILE).is_file():
        try:
            since, before = "the last start", to_plain(configs.load_recorded(folder / CONFIG_FILE))
        except UserError:  # of an older version, or damaged: it is written anew
            return
    else:
        return
    for key, (was, value) in changes(before, to_plain(config)).items():
        say(f"changed since {since}: {key} from {was} to {value}")


_locks: dict[Path, runtime.FolderLock] = {}


def take(folder: Path) -> None:
    """Takes the run folder for this process, for its life; rank 0 does, and waits for another run's end.

    Raises:
        UserError: on rank 0: another run works in it.
    """
    with phase(f"waiting for the run that uses {folder}", announce=False):
        if folder.resolve() not in _locks:
            _locks[folder.resolve()] = runtime.FolderLock(folder / LOCK_FILE, _LOCK_SECONDS)


def _check_writable(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise _unwritable(folder, f"{nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"no permission to write in {nearest}")


def _unwritable(folder: Path, reason: str) -> UserError:
    fix = "choose another with run.folder=PATH or change its permissions"
    return UserError(f"run.folder: {folder} cannot be written ({reason}); {fix}")


def _check_inputs(config: Config) -> None:
    for address in config.data.shards:
        check_relative("data.shards", address)
    if config.evaluation.every_steps:
        check_relative("evaluation.reference", config.evaluation.reference)
    infos = [folder.latents_info for folder in open_folders(config)]
    check_infos(infos, config)
    if runtime.rank() == 0:
        _check_autoencoder(infos[0], config)
    found = _newest_readable(make_store(config))
    if found is None:
        return
    latest, saved = found
    saved.check_config(to_plain(config), str(latest))
    if saved.autoencoder not in ("", infos[0].autoencoder):
        raise UserError(
            f"data.shards: expected latents of the autoencoder {saved.autoencoder}, as checkpoint {latest} was trained "
            f"on, got those of {infos[0].autoencoder}; set data.shards as it was or choose another run.folder"
        )
    # An imported checkpoint has none: it stands at the beginning of an epoch of any data.
    if saved.data_fingerprint and saved.data_fingerprint != order_fingerprint(config):
        raise UserError(
            f"data.shards: checkpoint {latest} was trained on other shards than {', '.join(config.data.shards)}, or "
            "with other data.repeat, data.num_canonical_nodes or data.shuffle_block_size, so its place in the data "
            "means nothing here; set these as they were or choose another run.folder"
        )
    if saved.seed != config.run.seed:
        raise UserError(
            f"run.seed: expected {saved.seed}, the seed of checkpoint {latest}, got {config.run.seed}; "
            "another seed is another order of the data: choose another run.folder"
        )


def _check_autoencoder(info: LatentsInfo, config: Config) -> None:
    """Refuses an autoencoder that did not make the latents, and would decode them to something else."""
    if config.data.autoencoder:
        found = make_autoencoder(config, torch.device("cpu"))
        check_autoencoder(info, found.fingerprint, found.shift, found.scale, "data.autoencoder")


def _newest_readable(store: CheckpointStore) -> tuple[Path, TrainingState] | None:
    for path in store.candidates():
        try:
            return path, read_state(path)
        except DamagedCheckpointError:
            continue  # said where it is resumed from
    return None


def finished_step(config: Config) -> int | None:
    """The step at which this run folder's run was completed under this config; None where there is work left."""
    # One rank's view of the folder decides.
    summary = runtime.gather(read_summary(Path(config.run.folder)) if runtime.rank() == 0 else None)[0]
    if summary is None:
        return None
    step = int(summary["num_steps"])
    latest = runtime.gather(_newest_readable(make_store(config)) if runtime.rank() == 0 else None)[0]
    if latest is not None and latest[1].step < step:
        return None  # set back by hand
    return step if is_done(config, step, float(summary["train_seconds"])) else None


def is_done(config: Config, step: int, train_seconds: float) -> bool:
    """Whether training has come to the end that the config sets."""
    limit = config.train.max_train_seconds
    return step >= config.train.num_steps or (limit > 0 and train_seconds >= limit)


def tracker_run_id(saved: TrainingState | None, folder: Path) -> str | None:
    """The wandb run to go on with; None begins one: a new run has none yet, and a copy of a run leaves that one alone.

    Args:
        saved: what the run goes on from, where it does.
        folder: of the run.
    """
    if saved is None or saved.wandb_run_id is None or not saved.working_folder or runtime.rank() != 0:
        return saved.wandb_run_id if saved else None
    run_id, before = saved.wandb_run_id, Path(saved.working_folder, str(saved.config.get("run", {}).get("folder", "")))
    with suppress(OSError, UserError):  # what cannot be read at its earlier place is no run that goes on there
        theirs = _newest_readable(CheckpointStore(before / CHECKPOINTS, keep_last=1, keep_every_steps=0))
        if theirs is not None and theirs[1].wandb_run_id == run_id and not before.samefile(folder):
            say(f"{folder} is a copy of {before}, to which wandb run {run_id} belongs: it begins one of its own")
            return None
    return run_id
