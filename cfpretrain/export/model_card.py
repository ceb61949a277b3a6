"""The model card of an export: README.md, as people and the hub read it."""

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cfpretrain.base.class_names import label_of
from cfpretrain.base.config import Config
from cfpretrain.base.console import visible
from cfpretrain.core.texts import FRAME
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.run.build import CONFIG_FILE, SUMMARY_NUMBERS
from cfpretrain.run.state import TRAINING_SECTIONS, TrainingState

_PLAIN = re.compile(r"[\w.-]+")
_MOST_NAMES = 20  # of classes that are listed
# Of sections that decide what is trained.
_PLACES = ("data.shards", "data.autoencoder", "data.cache_folder", "data.num_workers")

# Of each task: its tag on the hub, what the model makes, and what a sample was trained as.
_KINDS = {
    "class_to_image": ("class-conditional-image-generation", "class-conditional images", "an image of its class"),
    "text_to_image": ("text-to-image", "images of texts", "an image of its text"),
    "image_to_text": ("image-to-text", "texts about images", "the text of its image"),
    "interleaved": ("any-to-any", "samples of texts and images", "texts and images in the order of the sample"),
}

_WORDS = (("a text", "text", "a"), ("and another", "other", "b"))  # of two texts, from the longest on

_CARD = """---
library_name: diffusers
license: {license}
tags:
- causalfusion
{tags}
---

# {name}

{what} from a CausalFusion transformer:
diffusion inside autoregressive steps, any number of them, in any order
("Causal Diffusion Transformers for Generative Modeling", arXiv 2412.12095).

{picture}## Use

```python
{imports}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER_OR_REPOSITORY", trust_remote_code=True)
{calls}
```

`trust_remote_code` lets diffusers run the {files} Python files of this folder; read them first. They need
{packages} only. Image i of a seed is always the same (`seed=`, `ids=`; there is no `generator=`).

`num_ar_steps` goes from 1 (a diffusion transformer) to {num_tokens} (pure autoregression).
Solvers are `ddpm` (the default, 250 steps each), `ddim` (50), `dpm++` and `sde-dpm++` (25); `guidance_scale`
is 2 unless given, and 1 is none.

## Model

{model}

## Training

{training}

The config, as it was at this step, is in [{config}]({config}), without paths and addresses.

{licence} An autoencoder (`vae/`) may have one of its own.
"""


def text(
    *,
    name: str,  # of the model
    config: Config,  # that the checkpoint was trained with
    state: TrainingState,
    summary: Mapping[str, Any] | None,  # `build.read_summary`; None where the run has not ended
    weights: str,  # "ema" or "raw"
    dtype: str,  # of the weights' files
    licence: str,  # the hub's name of one
    class_names: Sequence[str],
    tokenizer: TextTokenizer | None,  # None for a model without texts
    num_parameters: int,  # of the transformer
    samples: str | None,  # the picture with samples; None without one
) -> str:
    """The card as Markdown."""
    tasks, model = _tasks(config), config.model
    if "class_to_image" not in tasks:  # a model may have classes that it never saw
        class_names = ()
    texts = [] if tokenizer is None else [_shown(words, tokenizer, model.max_text_tokens) for words in _WORDS]
    calls = _calls(tasks, class_names, min(4, model.num_tokens), texts, model.max_segments)
    stated = f"Licence: {_as_text(licence)}." if licence != "unknown" else "The licence of these weights is not stated."
    return _CARD.format(
        license=licence if _PLAIN.fullmatch(licence) else json.dumps(licence),
        name=_as_text(name),
        picture=f"![samples]({samples})\n\n" if samples else "",
        tags="\n".join(f"- {_KINDS[task][0]}" for task in tasks),
        what=_listed([_KINDS[task][1] for task in tasks]).capitalize(),
        imports="import PIL.Image\n" if any("PIL.Image" in line for line in calls) else "",
        calls="\n".join(calls),
        files="three" if tokenizer else "two",
        packages="torch, diffusers and tokenizers" if tokenizer else "torch and diffusers",
        num_tokens=model.num_tokens,
        model=_table(_model_rows(config, weights, dtype, class_names, num_parameters)),
        training=_table(_training_rows(config, state, summary)),
        config=CONFIG_FILE,
        licence=stated,
    )


def _tasks(config: Config) -> dict[str, float]:
    """What a sample was trained as, and with which weight."""
    return {task: weight for task, weight in vars(config.data.tasks).items() if weight}


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _shown(choices: Sequence[str], tokenizer: TextTokenizer, max_text_tokens: int) -> str:
    """The first of some texts that a model takes; the empty one, which any takes, where it is none of them."""
    for choice in choices:
        with contextlib.suppress(ValueError):  # it cannot be written in the tokens
            if len(tokenizer.encode(choice)) <= max_text_tokens - FRAME and not tokenizer.unknown_part(choice):
                return choice
    return ""


def _calls(
    tasks: Collection[str],
    class_names: Sequence[str],
    num_ar_steps: int,
    texts: Sequence[str],  # two, where the model has any
    max_segments: int,  # that the model knows in a sample
) -> list[str]:
    """Lines of Python that show what the model was trained for; each can be run behind those before it."""
    how, lines = f"num_ar_steps={num_ar_steps}, solver='sde-dpm++'", []
    if not {"class_to_image", "text_to_image"} & set(tasks):
        lines.append("images = [PIL.Image.open('one.png')]  # of any size")
    if "class_to_image" in tasks:
        last = len(class_names) - 1
        try:
            is_plain = label_of(class_names[last], class_names) == last and class_names[last].isprintable()
        except ValueError:
            is_plain = False
        lines.append(f"images = pipe([0, {repr(class_names[last]) if is_plain else last}], {how}).images")
        lines.append(f"edited = pipe.edit([{last}], region='top', image=images[:1], solver='sde-dpm++').images")
    if "text_to_image" in tasks:
        lines.append(f"images = pipe(prompt={texts!r}, {how}).images")
        settings = "region='top', image=images[:1], solver='sde-dpm++'"
        lines.append(f"edited = pipe.edit(prompt={texts[0]!r}, {settings}).images")
    if "image_to_text" in tasks:
        lines.append("texts = pipe.caption(images)")
    if "interleaved" in tasks:
        # The last text is continued, in its place.
        given = f"[{texts[0]!r}, images[0], {texts[1]!r}]" if max_segments > 2 else "[images[0]]"
        lines.append(f"parts = pipe.interleave({given}, max_new_parts=1, {how})")
    return lines


def _as_text(value: Any) -> str:
    """What stands for itself in a line of Markdown: no mark-up, no HTML, no new line."""
    # Of what is no mark-up, the hub makes links of addresses, and of @names.
    return re.sub(r"[\\`*_\[\]<>|&~@#]|(?<=(?i:www))\.|:(?=//)", r"\\\g<0>", visible(str(value)))


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_as_text(value)} |" for key, value in rows.items())])


def _model_rows(
    config: Config, weights: str, dtype: str, class_names: Sequence[str], num_parameters: int
) -> dict[str, Any]:
    model, noise = config.model, config.noise
    betas = f", linear betas {noise.beta_first:g} to {noise.beta_last:g}"
    names = ", ".join(class_names[:_MOST_NAMES]) + " ..." * (len(class_names) > _MOST_NAMES)
    texts = (
        f"{model.vocabulary:,} token ids, up to {model.max_text_tokens} tokens each with the two around them; "
        f"up to {model.max_segments} texts and images a sample"
    )
    return {
        "Parameters": f"{num_parameters:,}, {'averaged (EMA)' if weights == 'ema' else 'as trained'}, {dtype}",
        "Depth, width, heads": f"{model.depth}, {model.width}, {model.num_heads}",
        **({} if model.trunk == "causalfusion" else {"Blocks": f"those of {model.trunk}"}),
        "Latents": f"{model.latent_channels} x {model.latent_size} x {model.latent_size}",
        "Tokens": f"{model.num_tokens}, patches of {model.patch_size} x {model.patch_size}",
        **({"Condition": f"{model.num_cond_tokens} tokens a class"} if class_names else {}),
        "Noise": f"{noise.process}, {noise.num_timesteps} timesteps{betas if noise.process != 'flow' else ''}",
        **({"Classes": f"{len(class_names)}: {names}"} if class_names else {}),
        **({"Texts": texts} if model.vocabulary else {}),
    }


def _training_rows(config: Config, state: TrainingState, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    train, order = config.train, config.order
    optimizer = "Muon and AdamW" if train.optimizer == "muon" else "AdamW"
    rows = {
        # An imported model may not say how long it was trained.
        "Steps": f"{state.step:,} of {train.global_batch_size} images" if state.step else "not known",
        "AR steps": f"{order.num_ar_steps or f'drawn, decay {order.ar_step_decay:g}'}, order {order.token_order}",
        "Optimizer": f"{optimizer}, learning rate {train.learning_rate:g}, EMA {train.ema_decay:g}",
        "Training time": f"{state.train_seconds:,.0f} s" if state.step else "not known",
        "Data fingerprint": state.data_fingerprint if state.data_fingerprint else "not known",
        "Written by": ", ".join(f"{package} {version}" for package, version in sorted(state.versions.items())),
    }
    if config.model.vocabulary:
        drawn = (f"{_KINDS[task][2]} ({weight:g})" for task, weight in _tasks(config).items())
        rows["Tasks"] = f"a sample was trained as {', '.join(drawn)}, drawn with these weights"
    changed = [
        f"{key} {before} up to step {resume['step']:,}, then {after}"
        for resume in state.history
        for key, (before, after) in resume["changed"].items()
        if key.split(".")[0] in TRAINING_SECTIONS and key not in _PLACES
    ]
    if changed:
        rows["Changed on the way"] = "; ".join(changed)
    if summary is not None and summary["num_steps"] == state.step and summary.keys() >= set(SUMMARY_NUMBERS):
        rows["Loss"] = f"{summary['loss_first']:.4f} at first, {summary['loss_last']:.4f} at last"
        rows["Speed"] = f"{summary['images_per_second']:,.1f} images/s, ranks: {summary['world_size']}"
    return rows
