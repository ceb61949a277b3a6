"""Makes one step of a run again: what it was trained on, sample by sample, and whether it computes the same numbers.

    deepspeed --num_accelerators 2 tools/replay.py runs/demo --step 1000

Every random number is a function of the seed and the step, so the nearest checkpoint before the step is all that is
needed. On as many ranks, the same ZeRO stage and the same kind of machine the loss is the logged one bit for bit; run
twice, another digest on the same machine means that it computes wrong. The run folder is only read, but for the results
in RUN/replay/step_N/: samples.json and samples.png.

Exit code 0: the loss equals the logged one; 1: it does not; 2: a mistake.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.console import UserError, exit_with, linger, phase, say

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.config import Config
    from cfpretrain.trainer import Trainer

_EXIT_UNEQUAL = 1
_NUM_SHOWN = 10
_COLUMNS, _MOST_IMAGES = 8, 64


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make one step of a run again and compare it with what was logged.")
    parser.add_argument("run", type=Path, help="a run folder, e.g. runs/demo")
    parser.add_argument("--step", type=int, required=True, help="the step, as in metrics.jsonl")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. data.shards=PATH")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parser.parse_intermixed_args()
    try:
        is_equal = run(arguments.run, arguments.step, arguments.overrides)
    except UserError as error:
        exit_with(error)
    if not is_equal:
        linger()
        raise SystemExit(_EXIT_UNEQUAL)


def run(folder: Path, step: int, overrides: list[str]) -> bool:
    """Replays on all ranks; whether the loss is the logged one bit for bit."""
    with phase("loading torch, deepspeed and streaming"):
        from cfpretrain import build, runtime, trainer
        from cfpretrain import config as configs
    if not (folder / build.CONFIG_FILE).is_file():
        raise UserError(f"run folder {folder} holds no {build.CONFIG_FILE}; give one that cfpretrain/train.py wrote")
    logged = _find_row(folder / build.METRICS_FILE, step)
    checkpoint = _find_checkpoint(folder / build.CHECKPOINTS, step)
    device = runtime.pick_device()
    runtime.start(device)
    try:
        # Rank 0's folder serves all ranks; the others' stay empty.
        with tempfile.TemporaryDirectory() as own:
            scratch = Path(runtime.gather(own)[0])
            config = configs.load(
                folder / build.CONFIG_FILE, [f"run.folder={scratch}", "metrics.wandb=disabled", *overrides]
            )
            configs.check(config, runtime.world_size())
            trainer.prepare_folder(config, device)
            found = _replay(trainer.Trainer(config, device, resume_from=checkpoint), step)
            runtime.barrier()
            result = _write(folder / "replay" / f"step_{step:08d}", found, logged, config)
            return bool(runtime.gather(result)[0])
    finally:
        runtime.stop()


def _find_row(metrics: Path, step: int) -> dict[str, Any]:
    from cfpretrain.metrics import read_metrics

    rows = {row["step"]: row for row in read_metrics(metrics)} if metrics.is_file() else {}
    if step not in rows:
        known = f"1 to {max(rows)}" if rows else "none"
        raise UserError(f"--step: expected a step that {metrics} has ({known}), got {step}")
    return rows[step]


def _find_checkpoint(folder: Path, step: int) -> Path:
    """The newest complete checkpoint of before the step."""
    from cfpretrain.checkpoint import CheckpointStore

    complete = {int(path.name.removeprefix("step_")): path for path in CheckpointStore(folder, 1, 0).candidates()}
    before = [at for at in complete if at < step]
    if not before:
        kept = ", ".join(map(str, sorted(complete))) or "none"
        raise UserError(
            f"--step: expected a step after one of the checkpoints that are kept (of steps {kept}), got {step}; "
            "checkpoint.keep_every_steps keeps some for good"
        )
    return complete[max(before)]


class _Watched:
    """The objective, with what goes through it kept."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        self.seen: list[tuple[Any, Any, Any, Any]] = []
        self._ids: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def draw(self, step: int, epoch: int, ids_B: "Tensor", *args: Any) -> Any:
        self._ids = ids_B
        return self._loss.draw(step, epoch, ids_B, *args)

    def __call__(self, model: Any, latents_BCYX: "Tensor", draws: Any) -> Any:
        terms = self._loss(model, latents_BCYX, draws)
        self.seen.append((self._ids, latents_BCYX, draws, terms))
        return terms


def _replay(trainer: "Trainer", step: int) -> dict[str, Any]:
    """Steps to the one that is asked for, and what all ranks know of it."""
    say(f"from step {trainer.at.step} to {step}")
    with phase(f"making {step - trainer.at.step} steps again", announce=False):
        while trainer.at.step < step - 1:
            trainer.train_step()
        trainer.loss = watched = _Watched(trainer.loss)  # type: ignore[assignment]
        trainer.train_step()
    trainer.loader.close()
    return _gather(trainer, watched)


def _gather(trainer: "Trainer", watched: _Watched) -> dict[str, Any]:
    from cfpretrain import runtime
    from cfpretrain.evaluation.generation import decode_to_look_at
    from cfpretrain.order import ar_weights

    decode, _ = decode_to_look_at(trainer.config)
    samples, images = [], {}
    for ids_B, latents_BCYX, draws, terms in watched.seen:
        error_BL = terms.squared_error_BL.double().cpu()
        order = trainer.config.order
        weights_BL = ar_weights(
            draws.steps_BL, order.ar_weight_first, order.ar_weight_last, order.ar_weight_schedule
        ).double()
        for i, sample_id in enumerate(ids_B.tolist()):
            samples.append(
                {
                    "id": sample_id,
                    "rank": runtime.rank(),
                    "label": int(draws.labels_B[i]),
                    "timestep": int(draws.timesteps_B[i]),
                    "ar_step_sizes": draws.steps_BL[i].unique(return_counts=True)[1].tolist(),
                    "loss": float((weights_BL[i] * error_BL[i]).mean()),
                }
            )
        images |= dict(zip(ids_B.tolist(), decode(latents_BCYX.cpu()), strict=True))
    digest = hashlib.sha256()
    for fragment in trainer.engine.fragments():
        digest.update(fragment.values.cpu().numpy().tobytes())
    of_ranks = runtime.gather((samples, images, digest.hexdigest()))
    all_samples = [sample for of_rank, _, _ in of_ranks for sample in of_rank]
    row = trainer.window.records[-1].row
    return {
        "samples": sorted(all_samples, key=lambda sample: (-sample["loss"], sample["id"])),
        "images": {i: image for _, of_rank, _ in of_ranks for i, image in of_rank.items()},
        "row": row,
        "digest": hashlib.sha256(
            json.dumps(
                [sorted(all_samples, key=lambda s: s["id"]), row["grad_norm"], [d for *_, d in of_ranks]]
            ).encode()
        ).hexdigest(),
    }


def _write(folder: Path, found: dict[str, Any], logged: dict[str, Any], config: "Config") -> bool | None:
    """Rank 0 writes and prints; whether the loss is the logged one."""
    from cfpretrain import runtime

    if runtime.rank() != 0:
        return None
    row, samples = found["row"], found["samples"]
    is_equal = (row["loss"], row["grad_norm"]) == (logged["loss"], logged["grad_norm"])
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "step": row["step"],
        "loss": row["loss"],
        "logged_loss": logged["loss"],
        "grad_norm": row["grad_norm"],
        "logged_grad_norm": logged["grad_norm"],
        "equal": is_equal,
        "digest": found["digest"],
        "num_ranks": runtime.world_size(),
        "zero_stage": config.engine.zero_stage,
        "skipped": row.get("skipped"),
        "samples": samples,
    }
    (folder / "samples.json").write_text(json.dumps(result, indent=1) + "\n")
    _draw(folder / "samples.png", found, row)
    _print(result, config.model.num_classes)
    say(f"see {folder}")
    return is_equal


def _draw(path: Path, found: dict[str, Any], row: dict[str, Any]) -> None:
    import torch

    from cfpretrain.evaluation import pictures

    shown = found["samples"][:_MOST_IMAGES]
    shown = shown[: len(shown) // _COLUMNS * _COLUMNS] or shown[:1]
    columns = min(_COLUMNS, len(shown))
    names = [f"loss {shown[i]['loss']:.3g}" for i in range(0, len(shown), columns)]
    images = torch.stack([found["images"][sample["id"]] for sample in shown])
    title = f"step {row['step']}: samples by loss, highest first\neach row begins with the loss at its left"
    pictures.sample_grid(path, images, names, title=title, value_range=(0.0, 1.0))


def _print(result: dict[str, Any], null_class: int) -> None:
    print(f"{'id':>10}{'class':>7}{'t':>6}{'AR steps':>10}{'loss':>12}")
    for sample in result["samples"][:_NUM_SHOWN]:
        label = "none" if sample["label"] == null_class else sample["label"]
        print(
            f"{sample['id']:10}{label:>7}{sample['timestep']:6}{len(sample['ar_step_sizes']):10}{sample['loss']:12.6f}"
        )
    if len(result["samples"]) > _NUM_SHOWN:
        print(f"{'...':>10}  and {len(result['samples']) - _NUM_SHOWN} more with lower losses")
    for name in ("loss", "grad_norm"):
        found, logged = result[name], result[f"logged_{name}"]
        verdict = "equal" if found == logged else "NOT EQUAL"
        print(f"{name:>10}: {found!r} now, {logged!r} logged: {verdict}")
    print(f"    digest: {result['digest'][:16]} (samples, losses, gradient norm, weights after the step)")


if __name__ == "__main__":
    main()
