"""The pipeline of CausalFusion (arXiv 2412.12095): images with any number of AR steps, editing, and texts.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipe([3, "seven"], num_ar_steps=4, num_inference_steps=25, guidance_scale=2.0, solver="sde-dpm++").images
    edited = pipe.edit([5], region="top", image=images[:1]).images

And of a model with texts:

    images = pipe(prompt="a bold seven", num_ar_steps=4, solver="sde-dpm++").images
    texts = pipe.caption(images)
    more = pipe.interleave(["two numbers:", images[0], "and", images[0]])

It stands alone: torch and diffusers are all that it needs, and for texts `tokenizers`.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from cfpretrain.base.class_names import label_of
from cfpretrain.export.pipeline_images import Images, check_output
from cfpretrain.export.pipeline_texts import Texts, to_continue
from cfpretrain.export.plain_files import put_text

# Noise levels and their spacing, where none are asked for.
_BY_SOLVER = {
    "ddpm": (250, "time"),
    "ddim": (50, "time"),
    "dpm++": (25, "log_snr"),
    "sde-dpm++": (25, "log_snr"),
}


class CausalFusionPipeline(DiffusionPipeline):
    """Generates and edits images; with texts, also from prompts, and writes texts about images.

    An image is a function of the seed and its id, and so is a text. Arguments of a call, of which a mistake raises
    ValueError:
        class_labels: classes by number, or by name; `name:` or `index:` before a text says which it is.
        num_ar_steps: from 1 (a diffusion transformer) to the number of tokens made (pure autoregression).
        num_inference_steps: noise levels that each AR step runs through; left out, 250 for "ddpm", 50 for "ddim",
            25 for the others.
        guidance_scale: of classifier-free guidance; 1 = none.
        solver: "ddpm", "ddim", or of second order "dpm++" and "sde-dpm++", the one for few steps. "ddim" and "dpm++"
            draw no noise on the way. Of the scheduler, only the noise schedule is used.
        seed: of noise and orders.
        ids: numbers of the images, from 0 on if left out: image i of a seed is always the same.
        ar_step_sizes: "equal", "cosine", or sizes that add up to the tokens made.
        guidance_schedule: "constant", or "linear": growing along the AR axis.
        guidance_interval: the first and last timestep (0 to 999) in which guidance acts; None for the last: to the end.
        level_spacing: noise levels evenly in "time" or in "log_snr"; left out, the latter for those of second order.
        output_type: "pil", "np", "pt" (both in [0, 1]), or "latent" (in the network's scale).
        return_dict: whether to return an `ImagePipelineOutput`, else a tuple.
        region, image, latents: see `edit`.
        prompt: of a model with texts, instead of `class_labels`: a text, or several.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None,  # an AutoencoderKL; None where latents are pixels
        id2label: dict[str, str] | None = None,  # the name of each class, by its number as text
        tokenizer: Any = None,  # a CausalFusionTokenizer; None for a model without texts
    ) -> None:
        super().__init__()
        size, vocabulary = 0 if tokenizer is None else tokenizer.size, transformer.config.get("vocabulary", 0)
        if size != vocabulary:
            raise ValueError(f"tokenizer: expected {vocabulary} token ids, as the transformer has, got {size}")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer)
        self.register_to_config(id2label=id2label)

    def save_pretrained(self, save_directory: Any, **settings: Any) -> None:
        """Saves all parts, as other pipelines do, and the code that they came with."""
        if settings.get("push_to_hub"):
            raise ValueError("push_to_hub: expected a folder to be saved first, then: hf upload REPOSITORY FOLDER")
        folder, own = Path(save_directory), {"": self, "transformer": self.transformer, "tokenizer": self.tokenizer}
        known = self.config["tokenizer"]
        self.register_to_config(tokenizer=(None, None))  # diffusers saves classes that it knows
        super().save_pretrained(save_directory, **settings)
        self.register_to_config(tokenizer=known)
        index_file = folder / "model_index.json"
        index = json.loads(index_file.read_text(encoding="utf-8"))
        for name, part in own.items():
            if part is not None:
                code = Path(str(sys.modules[type(part).__module__].__file__))
                index[name or "_class_name"] = [code.stem, type(part).__name__]
                put_text(folder / name / code.name, code.read_text(encoding="utf-8"))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")
        put_text(index_file, json.dumps(index, indent=2) + "\n")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_ar_steps: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        solver: str = "ddpm",
        seed: int = 0,
        ids: Sequence[int] | None = None,
        ar_step_sizes: str | Sequence[int] = "equal",
        guidance_schedule: str = "constant",
        guidance_interval: tuple[int, int | None] = (0, None),
        level_spacing: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        region: Any = None,
        image: Any = None,
        latents: Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
    ) -> Any:
        """Makes one image for each class or prompt; with a region, regenerates that of given images."""
        conditions = self._conditions(class_labels, prompt)
        ids_B = self._ids(ids, len(conditions), "class" if prompt is None else "prompt")
        check_output(output_type)
        given_BCYX, region_L = None, None
        if any(value is not None for value in (region, image, latents)):
            given_BCYX, region_L = self._images.given(image, latents, len(conditions)), self._region(region)
        how = self._how(
            num_ar_steps=num_ar_steps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
            seed=seed,
            ar_step_sizes=ar_step_sizes,
            guidance_schedule=guidance_schedule,
            guidance_interval=guidance_interval,
            level_spacing=level_spacing,
        )
        with self.progress_bar(total=how["num_ar_steps"] * how["num_inference_steps"]) as bar:
            latents_BCYX = self.transformer.sample(
                conditions,
                ids_B,
                marks=() if prompt is None else self._texts("prompt").marks,
                latents_BCYX=given_BCYX,
                region_L=region_L,
                on_step=bar.update,
                **how,
            )
        images = self._images.output(latents_BCYX, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def edit(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        region: Any = None,
        image: Any = None,
        latents: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Regenerates a region of each image, as the class or prompt asked for; the other tokens are its context.

        They come back bit for bit in latents (`output_type="latent"`).

        Args:
            class_labels: the new class of each image; or give `prompt`.
            region: "centre", "top", "bottom", "outside", "box:Y0,X0,Y1,X1" (rows and columns of tokens, ends left out)
                or "tokens:0,1,17" (row * columns + column); or a mask of the tokens, true where they are regenerated:
                bool [rows, columns] or [tokens].
            image: PIL images of any size, cropped as for training, upright, and on white where they are transparent; or
                a tensor or array [B, channels, height, width] in [0, 1].
            latents: instead of these, [B, channels, rows, columns] in the network's scale, as `output_type="latent"`
                gives them.
            settings: the other arguments of a call, e.g. `num_ar_steps` and `guidance_scale`.
        """
        return self(class_labels, region=region, image=image, latents=latents, **settings)

    @torch.no_grad()
    def caption(
        self,
        images: Any = None,
        prefix: str | Sequence[str] = "",
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        latents: Tensor | None = None,
    ) -> list[str]:
        """Writes a text about each image.

        Args:
            images, latents: as `image` and `latents` of `edit`.
            prefix: how the texts begin, or how each one does; blanks at its end are left out.
            max_tokens: of a text, the two that frame it among them; left out: as many as the model knows.
            temperature: of the softmax; 0 takes the likeliest token.
            top_k: only the k likeliest tokens; 0: all.
            top_p: only the likeliest tokens whose probabilities first reach p; 1: all.
            guidance_scale: away from what the model would write without the image; 1 = none.
            seed, ids: of what is drawn; see the class.
        """
        texts = self._texts("caption")
        given_BCYX = self._images.given(images, latents)
        num_images = len(given_BCYX)
        starts = [prefix] * num_images if isinstance(prefix, str) else list(prefix)
        prefixes = texts.encode("prefix", list(map(to_continue, starts)), max_tokens)
        if len(prefixes) != num_images:
            raise ValueError(f"prefix: expected one text, or {num_images}, one for each image, got {len(prefixes)}")
        written = self.transformer.caption(
            given_BCYX,
            self._ids(ids, num_images, "image"),
            prefixes,
            marks=texts.marks,
            max_tokens=texts.most(max_tokens),
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
        )
        self.maybe_free_model_hooks()
        return [self.tokenizer.decode(tokens) for tokens in written]

    @torch.no_grad()
    def interleave(
        self,
        parts: Sequence[Any],
        max_new_parts: int = 1,
        first: str | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        text_guidance_scale: float = 1.0,
        seed: int = 0,
        id: int = 0,
        output_type: str = "pil",
        **settings: Any,
    ) -> list[Any]:
        """Continues a sample of texts and images, and returns the parts that it adds.

        Args:
            parts: texts and images in order; an image is one of PIL, of any size, as of `edit`, a tensor or array
                [channels, height, width] in [0, 1], or latents: a tensor with as many channels, rows and columns as
                these have.
            max_new_parts: at most so many are added; the model may end sooner, and says itself where an image follows.
            first: whether a "text" or an "image" comes first. None: a text, which continues the last part where that
                is a text, and is then returned from its beginning, without blanks at that part's end.
            max_tokens, temperature, top_k, top_p, text_guidance_scale: as of `caption`.
            seed, id: of what is drawn.
            output_type: of the images, each by itself; see the class.
            settings: how images are made, as of a call: `num_ar_steps`, `guidance_scale`, `solver`, ...
        """
        texts, num_places = self._texts("interleave"), self.transformer.config.max_segments
        check_output(output_type)
        _check_parts(parts)
        if first not in (None, "text", "image"):
            raise ValueError(f"first: expected text, image or None, got {first!r}")
        continues = first is None and bool(parts) and isinstance(parts[-1], str)
        num_kept = len(parts) - continues
        if not 1 <= max_new_parts <= num_places - num_kept:
            raise ValueError(
                f"max_new_parts: expected at least 1 and, behind {num_kept} parts, at most {num_places - num_kept}, "
                f"since the model knows {num_places} places in a sample, got {max_new_parts}"
            )
        given = [
            texts.encode("parts", [part], max_tokens)[0] if isinstance(part, str) else self._images.given_part(part)
            for part in [*parts[:num_kept], *map(to_continue, parts[num_kept:])]
        ]
        writing = {"marks": texts.marks, "max_tokens": texts.most(max_tokens), "seed": seed, "temperature": temperature}
        new = self.transformer.interleave(
            given,
            self._ids([id], 1, "sample"),
            max_new_parts=max_new_parts,
            first=first,
            writing=writing | {"top_k": top_k, "top_p": top_p, "guidance_scale": text_guidance_scale},
            **self._how(seed=seed, **settings),
        )
        made = [
            self._images.output(part[None], output_type)[0] if isinstance(part, Tensor) else self.tokenizer.decode(part)
            for part in new
        ]
        self.maybe_free_model_hooks()
        return made

    @property
    def _images(self) -> Images:
        return Images(self.transformer, self.vae, self._execution_device)

    def _texts(self, what: str) -> Texts:
        if self.tokenizer is None:
            raise ValueError(f"{what}: expected a model with texts, got one that was trained without")
        return Texts(self.tokenizer, self.transformer.config.max_text_tokens)

    # -----------------------------------------------------------------------
    # What comes in

    def _conditions(
        self, class_labels: int | str | Sequence[int | str] | None, prompt: str | Sequence[str] | None
    ) -> Any:
        """Classes, int64 [B]; or the tokens of each text."""
        if (class_labels is None) == (prompt is None):
            raise ValueError("class_labels: expected classes or a prompt, got both or none")
        if class_labels is not None:
            return torch.tensor(self._labels(class_labels), device=self._execution_device)
        return self._texts("prompt").encode("prompt", [prompt] if isinstance(prompt, str) else list(prompt or ()))

    def _ids(self, ids: Sequence[int] | None, number: int, each: str) -> Tensor:
        ids = range(number) if ids is None else ids
        if len(ids) != number:
            raise ValueError(f"ids: expected {number}, one for each {each}, got {len(ids)}")
        return torch.tensor(list(ids), dtype=torch.int64, device=self._execution_device)

    def _how(
        self,
        *,
        num_ar_steps: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        solver: str = "ddpm",
        seed: int = 0,
        ar_step_sizes: str | Sequence[int] = "equal",
        guidance_schedule: str = "constant",
        guidance_interval: tuple[int, int | None] = (0, None),
        level_spacing: str | None = None,
    ) -> dict[str, Any]:
        """How images are made, as the transformer takes it: a call's arguments, and what those left out stand for."""
        usual_steps, usual_spacing = _BY_SOLVER.get(solver, _BY_SOLVER["ddpm"])
        if num_inference_steps is None:
            num_inference_steps = min(usual_steps, self.scheduler.config.num_train_timesteps)
        return {
            "seed": seed,
            "scheduler": self.scheduler.config,
            "num_inference_steps": num_inference_steps,
            "solver": solver,
            "level_spacing": level_spacing or usual_spacing,
            "num_ar_steps": num_ar_steps if isinstance(ar_step_sizes, str) else len(ar_step_sizes),
            "ar_step_sizes": ar_step_sizes,
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "guidance_interval": guidance_interval,
        }

    def _labels(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        if not given:
            raise ValueError("class_labels: expected at least one class, got none")
        return [self._label(label) for label in given]

    def _label(self, label: Any) -> int:
        num_classes = self.transformer.num_classes
        if not num_classes:
            raise ValueError(f"class_labels: expected a prompt, since this model has no classes, got {label!r}")
        if isinstance(label, str):
            names = {int(number): known for number, known in (self.config.id2label or {}).items()}
            try:
                return label_of(label, [names.get(i, str(i)) for i in range(num_classes)])
            except ValueError as error:
                raise ValueError(f"class_labels: {error}") from None
        # Whole numbers of numpy and torch are classes too; 3.7 and True are mistakes.
        number = label.__index__() if hasattr(label, "__index__") and not isinstance(label, bool) else -1
        if not 0 <= number < num_classes:
            raise ValueError(f"class_labels: expected 0 to {num_classes - 1}, got {label}")
        return int(number)

    def _region(self, region: Any) -> Tensor:
        """Tokens regenerated: bool [L]."""
        if region is None:
            raise ValueError("region: expected one, since images to edit are given, got none")
        try:
            return self.transformer.region(region if isinstance(region, str | Tensor) else torch.tensor(region))
        except ValueError as error:
            raise ValueError(f"region: {error}") from error


def _check_parts(parts: Any) -> None:
    """ValueError where they are no sample of texts and images."""
    if not isinstance(parts, list | tuple):  # a text would be taken apart into letters
        raise ValueError(f"parts: expected a list of texts and images, got {parts!r:.80}")
    if any(isinstance(one, str) and isinstance(other, str) for one, other in itertools.pairwise(parts)):
        raise ValueError("parts: expected an image between two texts, as in training, got two texts; join them")
