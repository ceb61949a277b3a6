"""Run where cfpretrain is not: loads exports of models with texts, and leaves what they make, write and refuse.

    python elsewhere_texts.py GIVEN MADE PROMPTS EXPORT...

Tensors to work on, where to leave those that are made, three prompts as JSON, and exported folders. The last line that
it prints is the rest, as JSON.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

# Beside this file.
from elsewhere import load, load_from_hub, refusal
from PIL import Image

QUICK = {"num_inference_steps": 3, "num_ar_steps": 4, "output_type": "latent"}


def of_pictures(pipe: Any, given: Any) -> dict[str, Any]:
    [picture] = pipe(prompt="a seven", **QUICK | {"output_type": "pil"}).images
    drawn = pipe.interleave([picture], 1, first="image", **QUICK | {"output_type": "pil"})
    refusals = [
        refusal(call)
        for call in (
            lambda: pipe(),
            lambda: pipe([3], prompt="a seven"),
            lambda: pipe(prompt=[]),
            lambda: pipe(prompt=[7]),
            lambda: pipe(prompt="a seven " * 100),
            lambda: pipe(prompt="lone \ud800"),
            lambda: pipe.caption(),
            lambda: pipe.caption(latents=given[:, :, :4]),
            lambda: pipe.caption(latents=given, prefix=["a", "b"]),
            lambda: pipe.caption(latents=given, max_tokens=1),
            lambda: pipe.caption(latents=given, temperature=-1),
            lambda: pipe.caption(latents=given, top_p=0),
            lambda: pipe.interleave(["a", picture], max_new_parts=4),
            lambda: pipe.interleave(["a"], first="picture"),
            lambda: pipe.interleave("a seven", 1),
            lambda: pipe.interleave(["a", "seven"]),
            lambda: pipe.interleave([None], first="image"),
            lambda: pipe.interleave(["a"], first="image", guidance_scale=float("nan")),
            lambda: pipe(prompt="a", guidance_scale=float("inf")),
            lambda: pipe.caption(picture, guidance_scale=float("nan")),
            lambda: pipe.caption("picture.png"),
            lambda: pipe.caption([picture, "picture.png"]),
            lambda: pipe.caption(given.new_full((1, 1, 8, 8), 200)),
            lambda: pipe.caption(given.new_full((1, 1, 8, 8), float("nan"))),
            lambda: pipe.caption(latents=given * float("inf")),
            lambda: pipe.interleave([(given[0] * 255).byte()], first="image"),
            lambda: pipe.caption(picture.convert("I;16")),
            lambda: type(pipe)(pipe.transformer, pipe.scheduler, pipe.vae),
        )
    ]
    writing = {"temperature": 1.0, "prefix": ["a", "a th"]}
    return {
        "pictured": [pipe.caption(picture), pipe.caption([picture, picture])[1:]],
        "blanks": [
            pipe.caption([picture] * 2, **writing),
            pipe.caption([picture] * 2, **writing | {"prefix": ["a ", "a th \n"]}),
        ],
        "blank goes on": [
            pipe.interleave([*before, f"a se{end}"], temperature=1.0)
            for before in ([], [picture])
            for end in ("", "  ")
        ],
        "pil": type(drawn[0]).__name__,
        "refusals": refusals,
    }


def of_any_size(pipe: Any, crops: Any) -> dict[str, Any]:
    """What is made of own.png and of its crop, whose pixels are given: each the same twice; and refusals."""
    own = Image.open("own.png")
    drawn = {"temperature": 1.0, "seed": 5, "prefix": "a"}
    return {
        "own captions": [pipe.caption([own, Image.new("L", (9, 70))], **drawn), pipe.caption(crops, **drawn)],
        "own goes on": [pipe.interleave([one], temperature=1.0, first="text") for one in (own, crops[0])],
        "own refusals": [
            refusal(call)
            for call in (
                lambda: pipe.caption(Image.new("L", (1, 2**22))),
                lambda: pipe.caption(Image.new("RGB", (0, 4))),
                lambda: pipe.caption(crops[..., :7]),
                lambda: pipe.interleave([crops[0, :, :7].numpy()], first="text"),
            )
        ],
    }


def run_card(folder: Path) -> dict[str, int]:
    """What the code of a model card makes: how many of which."""
    _, code, *_ = (folder / "README.md").read_text().split("```")
    scope: dict[str, Any] = {}
    exec(code.removeprefix("python").replace("FOLDER_OR_REPOSITORY", str(folder)), scope)
    return {name: len(value) for name, value in scope.items() if isinstance(value, list)}


def main() -> None:
    given_file, made_file, prompts, *exports = sys.argv[1:]
    with contextlib.suppress(ImportError):
        importlib.import_module("cfpretrain")
        sys.exit("cfpretrain can be imported here")
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    tensors, asked = load_file(given_file), json.loads(prompts)
    given, crops = tensors["latents"], tensors["crops"]
    made: dict[str, Any] = {}
    said: dict[str, Any] = {}

    def make(name: str, pipe: Any) -> None:
        made[f"{name} prompt"] = pipe(prompt=asked, **QUICK).images
        made[f"{name} alone"] = pipe(prompt=asked[2], ids=[2], **QUICK).images
        made[f"{name} class"] = pipe([3, 7], **QUICK).images
        made[f"{name} edited"] = pipe.edit(
            prompt=asked, region="centre", latents=given, **QUICK | {"num_ar_steps": 2}
        ).images
        said[f"{name} captions"] = pipe.caption(latents=given)
        drawn = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "guidance_scale": 1.5, "seed": 3, "ids": [4, 5, 6]}
        said[f"{name} drawn"] = pipe.caption(latents=given, prefix=["a", "", "a th"], max_tokens=12, **drawn)
        pixels = pipe.transformer.scaling.from_model(given)
        parts = pipe.interleave(
            [pixels[0], "a se"], temperature=1.0, seed=1, id=7, first="text", max_tokens=10, **QUICK
        )
        said[f"{name} goes on"] = parts
        first = pipe.interleave(["a se"], 2, first="image", id=1, temperature=1.0, **QUICK)
        made[f"{name} interleaved"], said[f"{name} interleaved"] = first[0], first[1:]

    for folder in exports:
        name, pipe = Path(folder).name, load(folder)
        make(name, pipe)
        pipe.save_pretrained(f"{folder}-saved", safe_serialization=True)
        make(f"{name} saved", load(f"{folder}-saved"))
        if folder == exports[0]:
            make(f"{name} hub", load_from_hub(folder))
            said |= of_pictures(pipe, given)
            said |= of_any_size(pipe, crops)
            edit = {"prompt": asked[0], "region": "centre", **QUICK | {"num_ar_steps": 2}}
            made["own edited"] = pipe.edit(image=Image.open("own.png"), **edit).images
            said["card"] = run_card(Path(folder))
            said["interleaved cards"] = [run_card(Path("cards", str(number))) for number in range(3)]
            half = load(folder, torch_dtype=torch.bfloat16)
            made["half prompt"] = half(prompt=asked, **QUICK).images
            said["half captions"] = half.caption(latents=given)
    said["strangers"] = sorted({name.split(".")[0] for name in sys.modules} & {"cfpretrain", "transformers"})
    save_file({name: value.float().contiguous() for name, value in made.items()}, made_file)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
