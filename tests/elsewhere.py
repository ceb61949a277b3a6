"""Run where cfpretrain is not: loads exports in one process, and leaves what they make and what they refuse.

    python elsewhere.py DIGITS RAW VERSION LATENTS GIVEN MADE SOLVERS PROCESS...

Four exported folders (DIGITS, the same code with other weights, with other code, one with an autoencoder), the tensors
to work on, where to leave those that are made, the names of solvers, with commas, and exported folders that are named
like their noise process. The last line it prints is what else there is to say, as JSON.
"""

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

LABELS = [3, "7", 0]
QUICK = {"num_inference_steps": 3, "guidance_scale": 2.0}


def load(folder: str, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_from_hub(folder: str) -> Any:
    """As `load`, from a hub that has this folder; nothing comes but the files that are asked for."""
    import diffusers.pipelines.pipeline_utils as pipelines
    import diffusers.utils.dynamic_modules_utils as modules
    from huggingface_hub.utils import filter_repo_objects

    here, there = Path(f"{folder}-from-hub"), Path(folder)
    files = [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files], sha="0" * 40)

    def fetch(_: object, file: str, **__: object) -> str:
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copyfile(there / file, here / file)  # type: ignore[return-value]

    def fetch_all(name: str, *, allow_patterns: Any, ignore_patterns: Any, **_: object) -> str:
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in wanted:
            fetch(name, file)
        return str(here)

    with ExitStack() as patches:
        for module in (pipelines, modules):
            patches.enter_context(patch.object(module, "hf_hub_download", fetch))
            patches.enter_context(patch.object(module, "model_info", lambda *_, **__: info))
        patches.enter_context(patch.object(pipelines, "snapshot_download", fetch_all))
        return load("me/model")


def refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    digits, raw, version, latents, given_file, made_file, solvers, *processes = sys.argv[1:]
    with contextlib.suppress(ImportError):
        importlib.import_module("cfpretrain")
        sys.exit("cfpretrain can be imported here")

    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    given = load_file(given_file)["latents"]
    pipe = load(digits)

    def make(pipe: Any, *args: Any, num_ar_steps: int = 4, **options: Any) -> Any:
        call = pipe.edit if len(args) > 1 else pipe
        return call(*args, **{"num_ar_steps": num_ar_steps, "output_type": "latent", **QUICK, **options}).images

    def centre(**options: Any) -> Any:
        return make(pipe, LABELS, "centre", latents=given, num_ar_steps=2, **options)

    out = {
        f"{solver} {kind}": make(pipe, LABELS, solver=solver, output_type=kind)
        for solver in solvers.split(",")
        for kind in ("latent", "pt")
    }
    out["settings"] = make(
        pipe,
        LABELS,
        num_ar_steps=5,
        ar_step_sizes="cosine",
        num_inference_steps=4,
        guidance_schedule="linear",
        guidance_interval=(100, 700),
        level_spacing="log_snr",
        seed=3,
        ids=[6, 7, 8],
    )
    pictures = make(pipe, LABELS, output_type="pil")
    out["pil"] = torch.stack([torch.tensor(list(picture.tobytes())) for picture in pictures])
    out["np"] = torch.from_numpy(pipe(LABELS, num_ar_steps=4, output_type="np", return_dict=False, **QUICK)[0])
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 1:3] = True
    out["edited"] = centre()
    out["masked"] = make(pipe, LABELS, mask, image=given / 2 + 0.5, num_ar_steps=2)
    colourful = [picture.convert("RGB") for picture in pictures]
    out["pictures"] = make(pipe, LABELS, mask.tolist(), image=colourful, num_ar_steps=2, output_type="pt")
    out["everywhere"] = make(pipe, LABELS, torch.ones(16, dtype=torch.bool), latents=given)
    # Latents of an autoencoder, whose classes have names here.
    named = load(latents)
    named.register_to_config(id2label=dict(enumerate(["owl", "bass", "bass", "Crane"])))
    out["by name"] = make(named, ["crane", "owl", "4"], solver="ddim")
    out["by number"] = make(named, [3, 0, 4], solver="ddim")
    refusals = [
        refusal(call)
        for call in (
            lambda: pipe("eight"),
            lambda: named("bass"),
            lambda: named("owll"),
            lambda: pipe(10),
            lambda: pipe([3.7]),
            lambda: pipe([True]),
            lambda: pipe([]),
            lambda: pipe(LABELS, solver="euler"),
            lambda: pipe(LABELS, ar_step_sizes=[3, 4]),
            lambda: pipe(LABELS, num_ar_steps=17),
            lambda: pipe(LABELS, num_inference_steps=1),
            lambda: pipe(LABELS, ids=[1]),
            lambda: pipe(LABELS, output_type="png"),
            lambda: pipe.edit(LABELS, "middle", latents=given),
            lambda: pipe.edit(LABELS, torch.ones(3, 3, dtype=torch.bool), latents=given),
            lambda: pipe.edit(LABELS, "top"),
            lambda: pipe.edit([1], "top", latents=given),
            lambda: pipe.edit([1], "top", image=given[:1, :, :, :7] / 2 + 0.5),
            lambda: pipe(LABELS, latents=given),
            lambda: DiffusionPipeline.from_pretrained(digits),
        )
    ]
    for name, folder in (("raw", raw), ("version", version)):
        other = load(folder)
        out[name] = make(other, LABELS)
        out[f"after {name}"], out[f"edited after {name}"] = make(pipe, LABELS), centre()
        out[f"{name} again"] = make(other, LABELS)
    decoded = load(latents)
    for kind in ("latent", "pt"):
        out[f"autoencoder {kind}"] = make(decoded, [0, 4], num_ar_steps=2, output_type=kind)
    decoded.save_pretrained(f"{latents}-saved", safe_serialization=True)
    out["saved"] = make(load(f"{latents}-saved"), [0, 4], num_ar_steps=2, output_type="pt")
    out["after saving"] = make(decoded, [0, 4], num_ar_steps=2, output_type="pt")
    for name, folder, labels in (("raw", raw, LABELS), ("autoencoder latent", latents, [0, 4])):
        out[f"{name} from hub"] = make(load_from_hub(folder), labels, num_ar_steps=4 if name == "raw" else 2)
    for process in processes:
        other_process = load(process)
        for solver in solvers.split(","):
            out[f"{Path(process).name} {solver}"] = make(other_process, LABELS, solver=solver)
    other_process.scheduler = pipe.scheduler
    half = load(digits, torch_dtype=torch.bfloat16)
    out["half"] = make(half, LABELS, solver="ddim")
    out |= {f"weights.{name}": value for name, value in pipe.transformer.state_dict().items()}
    save_file({name: value.float().contiguous() for name, value in out.items()}, made_file)
    packages = {name.split(".")[0] for name in sys.modules}
    said = {
        "refusals": refusals,
        "swapped": refusal(lambda: make(other_process, LABELS)),
        "strangers": sorted(packages & {"cfpretrain", "deepspeed", "streaming", "omegaconf"}),
        "modules": [type(one).__module__ for one in (pipe, pipe.transformer, other, other.transformer)],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
