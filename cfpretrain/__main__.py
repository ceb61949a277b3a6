"""The installed command: `cfpretrain VERB ...`, or `python -m cfpretrain VERB ...`, runs the tool of that verb.

cfpretrain sample runs/demo --classes 3 7
deepspeed --module cfpretrain encode data/images --autoencoder autoencoders/kl16 --out data/latents
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from cfpretrain.base.command_line import Parser

_HERE = Path(__file__).resolve().parent
# Files of the folder tools/, and what `cfpretrain --help` says of them.
VERBS = {
    "train": ("train.py", "trains a model, or resumes a run"),
    "sample": ("sample.py", "images of a run or an exported folder"),
    "caption": ("caption.py", "captions of images, by a model with texts"),
    "interleave": ("interleave.py", "goes on with texts and images in any order"),
    "edit": ("edit.py", "a region of an image again, under a new class or text"),
    "evaluate": ("evaluate_fid.py", "FID and its kin, of a model or of images"),
    "export": ("export_hf.py", "a run as a folder for diffusers or transformers, or as the official .pt"),
    "make-shards": ("make_shards.py", "image files -> image shards"),
    "encode": ("encode_latents.py", "image shards -> latent shards"),
    "inspect": ("inspect_shards.py", "what a folder of shards holds; --verify reads all of it"),
    "train-tokenizer": ("train_tokenizer.py", "the captions of shards -> a tokenizer.json"),
    "estimate-memory": ("estimate_memory.py", "whether a config fits, by ZeRO stage"),
    "replay": ("replay.py", "one step of a run again, compared with what was logged"),
    "compare": ("compare_runs.py", "two runs step by step: losses, speed, wait for data"),
    "import-official": ("import_official.py", "a checkpoint of the official code -> a run folder"),
    "import-deepspeed": ("import_deepspeed.py", "DeepSpeed's own checkpoint -> a run folder"),
    "import-language-model": ("import_language_model.py", "GPT-2, Llama or Qwen3 -> a run folder that starts from it"),
    "import-autoencoder": ("import_autoencoder.py", "a published autoencoder -> a folder that training reads"),
    "crash-test": ("crash_test.py", "kills a run again and again, and compares it with one left alone"),
    "measure": ("measure.py", "speed and memory of a part; `cfpretrain measure` lists them"),
}


def main() -> None:
    """The command."""
    words = sys.argv[1:]
    of_launcher = [words.pop(0)] if words and words[0].startswith("--local_rank") else []  # it comes first
    if not words or words[0] not in VERBS:
        lines = (f"  {verb:<23}{text}" for verb, (_, text) in VERBS.items())
        parser = Parser("\n".join([__doc__ or "", "VERB is one of", "", *lines]), "cfpretrain")
        parser.add_argument("verb", metavar="VERB", choices=VERBS, help="see below; cfpretrain VERB --help says more")
        parser.parse_args(words[:1])
    verb = words.pop(0)
    sys.argv = [f"cfpretrain {verb}", *of_launcher, *words]
    # Not by runpy, which gives the script's own name to argv and thereby to usage and messages.
    spec = spec_from_file_location("__main__", file_of(verb))
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    script.__spec__ = None  # processes that are spawned go by the file
    sys.modules["__main__"] = script
    spec.loader.exec_module(script)


def file_of(verb: str) -> Path:
    """The script of a verb: tools/ lies in an installed package, and beside it in a checkout."""
    if verb == "train":
        return _HERE / "train.py"
    folder = next(place for place in (_HERE / "tools", _HERE.parent / "tools") if place.is_dir())
    return folder / VERBS[verb][0]


if __name__ == "__main__":
    main()
