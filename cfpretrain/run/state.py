"""What a run is besides its tensors: the counters, and the record of what was trained; a checkpoint's `state.json`.

The record is the resolved config in force when the checkpoint was written, how it was changed on the way, and what the
config only points to: the names of the classes and the autoencoder behind the latents. Whoever samples, scores, exports
or replays a checkpoint takes them from here, so that no later edit of a config changes what its weights mean.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from cfpretrain.base import typed
from cfpretrain.base.console import UserError, excerpt
from cfpretrain.base.files import parse_json, read_text
from cfpretrain.base.typed import Natural, NotNegative
from cfpretrain.run.guard import GuardState
from cfpretrain.run.tensor_files import DamagedCheckpointError, remedy, unreadable

# 1 had no hashes, and neither `guard` nor `num_rewinds`; 2 had `model`, a section of the config, and no other record.
SCHEMA_VERSION: Literal[3] = 3
STATE_FILE = "state.json"

TRAINING_SECTIONS = ("order", "data", "train", "guard")  # of a config: other values train otherwise from there on
# What the past training means: with other values the weights are those of another model. The rest may change.
_FIXED_SECTIONS, _FIXED_KEYS = ("model", "noise"), ("data.latent_shift", "data.latent_scale")
# Keys that older records lack, with what was trained then.
_ADDED_KEYS: dict[str, Any] = {
    "noise.process": "epsilon",
    "noise.flow_times": "logit_normal",
    "model.trunk": "causalfusion",
    "model.num_kv_heads": 0,
    "model.head_width": 0,
    "model.mlp_width": 0,
    "model.mlp": "auto",
    "model.norm_eps": 0.0,
    "model.rotary_base": 0.0,
    "model.rotary_scaling": [],
    "model.separate_image_weights": False,
    "model.vocabulary": 0,
    "model.max_text_tokens": 64,
    "model.max_segments": 2,
}


class Resume(TypedDict):
    """What a resume changed: values before and after, by key."""

    step: Natural
    changed: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides its tensors to go on as if it had never stopped, and others to know what was trained."""

    step: Natural  # optimizer steps taken or skipped = global batches consumed
    optimizer_step: Natural  # steps Adam has applied: its bias correction
    num_skipped: Natural  # batches whose update is not in the weights: skipped, or undone by a rewind
    num_rewinds: Natural
    epoch: Natural
    samples_in_epoch: Natural  # samples of this epoch consumed, over all ranks
    train_seconds: NotNegative
    seed: Natural
    config: dict[str, dict[str, Any]]  # resolved, as plain values; of a checkpoint of schema 2 its section model alone
    history: list[Resume]  # in their order
    class_names: list[str]  # by number; none where they are not known
    autoencoder: str  # fingerprint of the one behind the latents, or "identity"; empty where it is not known
    working_folder: str  # what relative paths of the config are relative to; empty where it is not known
    data_fingerprint: str
    guard: GuardState  # the window of recent losses and gradient norms
    wandb_run_id: str | None
    versions: dict[str, str]  # of the packages that wrote it
    data_kind: str = ""  # of the shards trained on: "latents" or "images"; empty in older ones
    tokenizer: str = ""  # fingerprint of the one behind the texts; empty without texts
    schema_version: Literal[3] = SCHEMA_VERSION

    def to_json(self) -> str:
        """The state as JSON text, one key a line, and a hash of it."""
        plain = json.loads(dump(dataclasses.asdict(self)))
        return dump(plain | {"sha256": _hash(plain)})

    @classmethod
    def from_json(cls, text: str, source: Path) -> "TrainingState":
        """Reads what `to_json` wrote, of this schema or of schema 2; `source` is the file, for messages.

        Raises:
            DamagedCheckpointError: not JSON; keys missing, unknown or of another type, all in one message; or not
                what was written.
        """
        try:
            plain = parse_json(text)
        except ValueError as error:
            raise DamagedCheckpointError(f"{source}: expected JSON, got {error}; {remedy(source)}") from error
        is_what_was_written = False
        if isinstance(plain, dict):
            _check_schema(plain, source)
            sha256 = plain.pop("sha256", None)
            is_what_was_written = sha256 is not None and sha256 == _hash(plain)
            if plain.get("schema_version") == 2:
                plain = _from_schema_2(plain)
        try:
            state: TrainingState = typed.from_plain(cls, plain, str(source))
        except UserError as error:
            raise DamagedCheckpointError(f"{error}; {remedy(source)}") from error
        if not is_what_was_written:
            raise DamagedCheckpointError(
                f"{source}: its contents are not those that were written (sha256); {remedy(source)}"
            )
        return state

    @property
    def has_record(self) -> bool:
        """Whether it holds a whole config; one of schema 2 does not."""
        return "noise" in self.config

    def config_at(self, step: int) -> dict[str, Any]:
        """The config in force when an earlier step was made, or this one; steps count from 1."""
        config = {section: dict(knobs) for section, knobs in self.config.items()}
        for resume in reversed(self.history):
            if resume["step"] < step:
                break
            for path, (before, _) in resume["changed"].items():
                section, _, key = path.partition(".")
                config.setdefault(section, {})[key] = before
        return config

    def history_with(self, config: Mapping[str, Any]) -> list[Resume]:
        """The history of a run that goes on from here under this config, of plain values."""
        changed = changes(self.config, config) if self.has_record else {}
        return [*self.history, {"step": self.step, "changed": changed}] if changed else self.history

    def check_config(self, config: Mapping[str, Any], source: str) -> None:
        """Refuses to continue another model: another network, noise schedule, or scale of latents.

        `config` is the whole one, as plain values; `source` is the checkpoint, for the message.
        """
        differing = self.contradictions(config)
        if differing:
            raise UserError(
                f"checkpoint {source} is of another model: {', '.join(differing)}; "
                "set these keys alike or choose another run.folder"
            )

    def contradictions(self, config: Mapping[str, Any]) -> list[str]:
        """Where a config, of plain values, says otherwise what the past training means: each key with both values."""
        theirs = _fixed(config)
        ours = {path: value for path, value in _ADDED_KEYS.items() if path in theirs} | _fixed(self.config)
        both = {
            path: (ours.get(path, "absent"), theirs.get(path, "absent"))
            for path in sorted(ours.keys() | theirs.keys())
            if path.split(".")[0] in self.config
        }
        return [
            f"{path} is {excerpt(str(one), 100)} there and {excerpt(str(other), 100)} in the config"
            for path, (one, other) in both.items()
            if not means_the_same(one, other)
        ]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two configs of plain values set differently, {key: (before, after)}; where the run lies does not count."""
    then, now = _flat(before), _flat(after)
    return {
        path: (then[path], value)
        for path, value in now.items()
        if path in then and then[path] != value and path != "run.folder"
    }


def read_state(path: Path) -> TrainingState:
    """The counters and the record of a complete checkpoint.

    Raises:
        DamagedCheckpointError: its state.json is not what was written.
    """
    file = path / STATE_FILE
    try:
        text = read_text(file, follow=False)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint: expected a folder such as checkpoints/step_00000500 "
            f"with {STATE_FILE} in it; give the path of one"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"{file} cannot be read", error, remedy(file)) from error
    return TrainingState.from_json(text, file)


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that may not change, with their values."""
    flat = _flat(config)
    return {path: v for path, v in flat.items() if path in _FIXED_KEYS or path.split(".")[0] in _FIXED_SECTIONS}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their whole keys, as a file has them: a tuple of a config is a list there."""
    as_in_file = json.loads(json.dumps(dict(config)))
    return {f"{section}.{key}": value for section, knobs in as_in_file.items() for key, value in knobs.items()}


def means_the_same(one: Any, other: Any) -> bool:
    """Equality; one value for all channels is the same as that value for each, and numbers may be rounded."""
    if not all(isinstance(values, list | tuple) and values for values in (one, other)):
        return bool(one == other)
    size = max(len(one), len(other))
    full = [values * size if len(values) == 1 else values for values in (one, other)]
    try:
        return len(full[0]) == len(full[1]) and all(
            math.isclose(a, b, rel_tol=1e-6) for a, b in zip(*full, strict=True)
        )
    except (TypeError, OverflowError):  # no numbers, or none that a machine counts
        return False


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def dump(plain: Mapping[str, Any]) -> str:
    """JSON text, one key a line; ValueError where a number is not finite."""
    return json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _hash(plain: Mapping[str, Any]) -> str | None:
    try:
        return hashlib.sha256(dump(plain).encode(), usedforsecurity=False).hexdigest()
    except ValueError:  # a number that is not finite: we wrote none
        return None


def _check_schema(plain: Mapping[str, Any], source: Path) -> None:
    version = plain.get("schema_version")
    if not isinstance(version, int) or not (version > SCHEMA_VERSION or version == 1):
        return
    by_whom, fix = "a newer cfpretrain", ""
    if version == 1:
        by_whom, fix = "an older cfpretrain, without hashes", ", or choose another run.folder"
    raise UserError(
        f"{source}: schema_version {version!s:.40} was written by {by_whom}; this one reads {SCHEMA_VERSION}: install "
        f"the version that wrote it ({plain.get('versions')!r:.80}){fix}"
    )


def _from_schema_2(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of this schema."""
    rest = {key: value for key, value in plain.items() if key != "model"}
    config = {"config": {"model": plain["model"]}} if isinstance(plain.get("model"), dict) else {}
    empty: dict[str, Any] = {"history": [], "class_names": [], "autoencoder": "", "working_folder": ""}
    return empty | rest | config | {"schema_version": SCHEMA_VERSION}
