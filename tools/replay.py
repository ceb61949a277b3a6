"""Makes one step of a run again: what it was trained on, sample by sample, and whether it computes the same numbers.

    deepspeed --num_accelerators 2 tools/replay.py runs/demo --step 1000

Every random number is a function of the seed and the step, so the nearest checkpoint before the step is all that is
needed. On as many ranks, the same ZeRO stage and the same kind of machine the loss is the logged one bit for bit; run
twice, another digest on the same machine means that it computes wrong. A skipped step is replayed as any other, and so
is one after a rewind, as long as the checkpoint that the run went back to is kept. The run folder is only read, but for
the results in RUN/replay/step_N/: samples.json and samples.png.

Exit code 0: the loss equals the logged one; 1: it does not; 2: a mistake; 3: the run turned out sick before the step.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files, launch
from cfpretrain.base.command_line import Parser, add_local_rank
from cfpretrain.base.console import SickRunError, UserError, ending_in_one_line, linger, path_argument, phase, say
from cfpretrain.base.outputs import writing

if TYPE_CHECKING:
    from cfpretrain.base.config import Config
    from cfpretrain.core.modalities import LossTerms
    from cfpretrain.core.objective import Batch
    from cfpretrain.training.trainer import Trainer

_EXIT_UNEQUAL = 1
_NUM_SHOWN = 10
_MAY_DIFFER = ("data.shards=", "data.autoencoder=", "data.num_workers=", "engine.", "train.micro_batch_size=")
_COLUMNS, _MOST_IMAGES = 8, 64


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=path_argument, help="a run folder, e.g. runs/demo")
    parser.add_argument("--step", type=int, required=True, help="the step, as in metrics.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. data.shards=PATH")
    add_local_rank(parser)
    arguments = parser.parse_intermixed_args()
    launch.check()
    with ending_in_one_line():
        is_equal = run(arguments.run, arguments.step, arguments.overrides)
    if not is_equal:
        linger()
        raise SystemExit(_EXIT_UNEQUAL)


def run(folder: Path, step: int, overrides: list[str]) -> bool:
    """Replays on all ranks; whether the loss is the logged one bit for bit."""
    for override in overrides:
        if not override.startswith(_MAY_DIFFER):
            raise UserError(
                f"argument {override!r}: the step is made again as it was; only {', '.join(_MAY_DIFFER)} may differ"
            )
    is_told = any(override.startswith("data.shards=") for override in overrides)
    with phase("loading torch, deepspeed and streaming"):
        from cfpretrain.base import config as configs
        from cfpretrain.base import config_checks, runtime
        from cfpretrain.run import build
        from cfpretrain.training import trainer
    device = runtime.pick_device()
    with runtime.ranks_of_a_tool(device):
        with runtime.together():
            found = _look(folder, step) if runtime.rank() == 0 else None
        rows, checkpoints, in_force = runtime.gather(found)[0]
        # Rank 0's folder serves all ranks; the others' hold the config alone.
        with tempfile.TemporaryDirectory() as own:
            scratch = Path(runtime.gather(own)[0])
            as_it_was = Path(own) / build.CONFIG_FILE
            files.replace(as_it_was, configs.to_yaml(in_force))
            config = configs.load(as_it_was, [*overrides, f"run.folder={scratch}", "metrics.wandb=disabled"])
            config_checks.check(config, runtime.world_size())
            elsewhere = [one for one in config.data.shards if "://" in one]
            if elsewhere and not is_told:
                raise UserError(
                    f"data.shards: {folder} names the address {elsewhere[0]!r:.200}, which is only opened where the "
                    "command line says so; give data.shards=[ADDRESS, ...], or a folder of the same shards"
                )
            trainer.prepare_folder(config, device)
            result, images = _replay(trainer.Trainer(config, device, resume_from=checkpoints), checkpoints, step, rows)
            with runtime.together():
                if runtime.rank() == 0:
                    _write(folder / "replay" / f"step_{step:08d}", result, images, config.model.num_classes)
            return bool(result["equal"])


def _look(folder: Path, step: int) -> "tuple[dict[int, dict[str, Any]], list[Path], Config]":
    """The run's rows up to the step, the checkpoints of before it, newest first, and the config that it was made with.

    Of the rows only the step's own and those with a rewind. Rank 0 looks for all.
    """
    from cfpretrain.run import build
    from cfpretrain.run.checkpoint_store import step_of
    from cfpretrain.run.metrics import read_metrics

    config, metrics = build.config_at(folder, step), folder / build.METRICS_FILE
    rows = {row["step"]: row for row in read_metrics(metrics)} if metrics.is_file() else {}
    if step not in rows:
        known = f"1 to {max(rows)}" if rows else "none"
        raise UserError(f"--step: expected a step that {metrics} has ({known}), got {step}")
    complete = build.make_store(config).candidates()
    before = sorted((path for path in complete if step_of(path) < step), key=step_of, reverse=True)
    if not before:
        kept = ", ".join(map(str, sorted(map(step_of, complete)))) or "none"
        raise UserError(
            f"--step: expected a step after one of the checkpoints that are kept (of steps {kept}), got {step}; "
            "checkpoint.keep_every_steps keeps some for good"
        )
    _check_unchanged(folder, step_of(before[0]), step)
    rows = {at: row for at, row in rows.items() if at == step or (at < step and "rewound_to_step" in row)}
    return rows, before, config


def _check_unchanged(folder: Path, begin: int, step: int) -> None:
    """Refuses a step that was trained with other knobs than those between it and the checkpoint at `begin`."""
    from cfpretrain.base.config import to_plain
    from cfpretrain.run import build
    from cfpretrain.run.state import TRAINING_SECTIONS, changes

    there, here = (to_plain(build.config_at(folder, at)) for at in (begin + 1, step))
    changed = [
        f"{key} from {before} to {after}"
        for key, (before, after) in changes(there, here).items()
        if key.split(".")[0] in TRAINING_SECTIONS and not f"{key}=".startswith(_MAY_DIFFER)
    ]
    if changed:
        raise UserError(
            f"--step: between the checkpoint of step {begin} and step {step} the run was resumed with other knobs "
            f"({', '.join(changed):.300}), and the checkpoint that it was resumed from is gone; replay a step before "
            "that, or one after the next checkpoint"
        )


class _Watched:
    """The objective, with what goes through it kept."""

    def __init__(self, loss: Any) -> None:
        self._loss, self.total, self.weights = loss, loss.total, loss.weights
        self.seen: list[tuple[Batch, dict[str, LossTerms]]] = []

    def __call__(self, model: Any, batch: "Batch") -> "dict[str, LossTerms]":
        terms = self._loss(model, batch)
        self.seen.append((batch.to("cpu"), terms))
        return terms


def _replay(
    trainer: "Trainer", checkpoints: Sequence[Path], step: int, logged: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[tuple[int, int], Any]]:
    """Steps to the one that is asked for; returns what all ranks know of it, and its images by sample and number."""
    say(f"from step {trainer.at.step} to {step}")
    with phase(f"making {step - trainer.at.step} steps again", announce=False):
        while trainer.at.step < step - 1:
            _make_step(trainer, checkpoints, logged)
        trainer.step.loss = watched = _Watched(trainer.step.loss)  # type: ignore[assignment]
        try:
            _make_step(trainer, checkpoints, logged)
        except SickRunError as error:
            say(f"this step was the run's last: {error}")
    trainer.loader.close()
    return _gather(trainer, watched, logged[step])


def _make_step(trainer: "Trainer", checkpoints: Sequence[Path], logged: Mapping[int, Mapping[str, Any]]) -> None:
    from cfpretrain.run.checkpoint_store import step_of

    # A rewind goes to one of the checkpoints that the run had at that time.
    trainer.checkpoints.resume_from = [path for path in checkpoints if step_of(path) <= trainer.at.step]
    trainer.train_step()
    row = trainer.log.rows[-1]
    there = logged.get(row["step"], {}).get("rewound_to_step")
    here = row.get("rewound_to_step")
    if there is not None and there != here:
        raise UserError(
            f"--step: at step {row['step']} the run went back to step {there}, and this replay "
            f"{f'to step {here}' if here is not None else 'did not go back'}: the checkpoint of step {there} is no "
            "longer kept, or the steps before came out otherwise; replay a step up to there, or one after the next "
            "checkpoint"
        )


def _look_at(trainer: "Trainer", watched: _Watched) -> tuple[list[dict[str, Any]], dict[tuple[int, int], Any]]:
    """This rank's images as people see them, by sample and number, and what is known of each; of texts, nothing."""
    from cfpretrain.base import runtime
    from cfpretrain.core.latents import take_tokens, unpatchify
    from cfpretrain.evaluation.generation import decode_to_look_at
    from cfpretrain.run.metrics import finite_or_none

    decode, _ = decode_to_look_at(trainer.config, trainer.device)
    samples: list[dict[str, Any]] = []
    images: dict[tuple[int, int], Any] = {}
    for batch, terms in watched.seen:
        of_class = next((one for one in batch.segments if one.kind == "class"), None)
        of_images = [one for one in batch.segments if one.kind == "image"]
        if not of_images:
            continue
        errors = terms["image"].squared_error_BLP.mean(-1).double().cpu().chunk(len(of_images), dim=1)
        numbers = dict.fromkeys(batch.ids_B.tolist(), 0)  # of the image, in its sample
        for image, error_BL in zip(of_images, errors, strict=True):
            loss_B = (image.weights_BL.double() * error_BL).mean(1)
            tokens_BLP = take_tokens(image.clean, image.positions_BL.argsort(1))
            latents_BCYX = unpatchify(tokens_BLP, trainer.config.model.patch_size)
            decoded = decode(latents_BCYX.to(trainer.device)).cpu()
            for i, sample_id in enumerate(batch.ids_B.tolist()):
                if image.lacks(i):
                    continue
                has_class = of_class is not None and not of_class.lacks(i)
                number = numbers[sample_id]
                images[sample_id, number] = decoded[i]
                samples.append(
                    {
                        "id": sample_id,
                        "image": number,
                        "rank": runtime.rank(),
                        "label": int(of_class.clean[i]) if has_class else trainer.config.model.num_classes,
                        "timestep": int(image.times_B[i]),
                        "ar_step_sizes": image.steps_BL[i].unique(return_counts=True)[1].tolist(),
                        "loss": finite_or_none(float(loss_B[i])),
                    }
                )
                numbers[sample_id] += 1
    return samples, images


def _gather(
    trainer: "Trainer", watched: _Watched, logged: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[tuple[int, int], Any]]:
    """What all ranks know of the step, and its images."""
    from cfpretrain.base import runtime

    samples, images = _look_at(trainer, watched)
    weights = hashlib.sha256()
    for fragment in trainer.engine.fragments():
        weights.update(fragment.values.cpu().numpy().tobytes())
    of_ranks = runtime.gather((samples, images, weights.hexdigest()))
    row, samples = trainer.log.rows[-1], [sample for of_rank, _, _ in of_ranks for sample in of_rank]
    hashed = [
        sorted(samples, key=lambda s: (s["id"], s["image"])),
        row["grad_norm"],
        [digest for *_, digest in of_ranks],
    ]
    result = {
        "step": row["step"],
        "loss": row["loss"],
        "logged_loss": logged.get("loss"),
        "grad_norm": row["grad_norm"],
        "logged_grad_norm": logged.get("grad_norm"),
        "equal": (row["loss"], row["grad_norm"]) == (logged.get("loss"), logged.get("grad_norm")),
        "digest": hashlib.sha256(json.dumps(hashed).encode()).hexdigest(),
        "logged_on": {name: logged.get(name) for name in ("num_ranks", "zero_stage")},
        "num_ranks": runtime.world_size(),
        "zero_stage": trainer.config.engine.zero_stage,
        "skipped": row.get("skipped"),
        # The worst first: one that is not finite, then by loss.
        "samples": sorted(samples, key=lambda s: (s["loss"] is not None, -(s["loss"] or 0.0), s["id"], s["image"])),
    }
    return result, {i: image for _, of_rank, _ in of_ranks for i, image in of_rank.items()}


def _show(loss: float | None, form: str) -> str:
    return "not finite" if loss is None else format(loss, form)


def _write(folder: Path, result: dict[str, Any], images: dict[tuple[int, int], Any], null_class: int) -> None:
    with writing(str(folder)):
        files.make_folder(folder.parent)
        files.make_folder(folder)
        files.remove_leftovers(folder)
        files.replace(folder / "samples.json", json.dumps(result, indent=1) + "\n")
        _draw(folder / "samples.png", result, images)
    _print(result, null_class)
    say(f"see {folder}")


def _draw(path: Path, result: dict[str, Any], images: dict[tuple[int, int], Any]) -> None:
    import torch

    from cfpretrain.evaluation import pictures

    shown = result["samples"][:_MOST_IMAGES]
    shown = shown[: len(shown) // _COLUMNS * _COLUMNS] or shown[:1]
    columns = min(_COLUMNS, len(shown))
    captions = [_show(sample["loss"], ".3g") for sample in shown]
    shown_images = torch.stack([images[sample["id"], sample["image"]] for sample in shown])
    title = f"step {result['step']}: samples by loss, highest first\nbelow each its loss"
    rows = [""] * (len(shown) // columns)
    pictures.sample_grid(path, shown_images, rows, title=title, value_range=(0.0, 1.0), captions=captions)


def _name(sample: dict[str, Any]) -> str:
    """The id of a sample, and of a further one of its images the number."""
    return f"{sample['id']}" + (f".{sample['image']}" if sample["image"] else "")


def _print(result: dict[str, Any], null_class: int) -> None:
    print(f"{'id':>10}{'class':>7}{'t':>6}{'AR steps':>10}{'loss':>12}")
    for sample in result["samples"][:_NUM_SHOWN]:
        label = "none" if sample["label"] == null_class else sample["label"]
        print(
            f"{_name(sample):>10}{label:>7}{sample['timestep']:6}{len(sample['ar_step_sizes']):10}"
            f"{_show(sample['loss'], '.6f'):>12}"
        )
    if len(result["samples"]) > _NUM_SHOWN:
        print(f"{'...':>10}  and {len(result['samples']) - _NUM_SHOWN} more with lower losses")
    for name in ("loss", "grad_norm"):
        found, logged = result[name], result[f"logged_{name}"]
        verdict = "equal" if found == logged else "NOT EQUAL"
        print(f"{name:>10}: {found!r} now, {logged!r} logged: {verdict}")
    then, now = result["logged_on"], {"num_ranks": result["num_ranks"], "zero_stage": result["zero_stage"]}
    if then != now:
        print(
            f"      note: logged on {then['num_ranks']} ranks at ZeRO stage {then['zero_stage']}, made again on "
            f"{now['num_ranks']} at stage {now['zero_stage']}: the last digits may differ"
        )
    if result["skipped"]:
        print(f"   skipped: {result['skipped']}")
    print(f"    digest: {result['digest'][:16]} (samples, losses, gradient norm, weights after the step)")


if __name__ == "__main__":
    main()
