"""Turns a published autoencoder's checkpoint into a folder that this project and diffusers read.

    python tools/import_autoencoder.py kl16.ckpt data/autoencoders/mar-kl16
    python tools/import_autoencoder.py v1-5-pruned-emaonly.safetensors data/autoencoders/sd-f8

It takes MAR's KL-16, Stable Diffusion's f8 (alone, or inside a whole checkpoint, whose other networks are left out),
any other autoencoder in Latent Diffusion's layout, as FLUX's, and an AutoencoderKL that diffusers saved as a pickle.
The values of the tensors are kept bit for bit. Nothing in a file is run: pickles of anything but tensors are refused.
Where OUT holds that autoencoder already, it is left as it is.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base.command_line import Parser
from cfpretrain.base.console import UserError, ending_in_one_line, path_argument, phase, say

if TYPE_CHECKING:
    from torch import Tensor


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", type=path_argument, help="checkpoint: .safetensors, or a pickle (.ckpt, .pt, .pth, .bin)")
    add("out", type=path_argument, help="folder to write")
    add(
        "--scaling-factor",
        type=float,
        help="what latents are multiplied by; left out, that of the published autoencoder of this layout "
        "(MAR's KL-16: 0.2325, Stable Diffusion's f8: 0.18215; SDXL's has the layout of the latter, but 0.13025)",
    )
    shift_help = (
        "what is subtracted from latents before (Stable Diffusion 3's: 0.0609, FLUX's: 0.1159; left out, nothing)"
    )
    add("--shift-factor", type=float, help=shift_help)
    arguments = parser.parse_args()
    with ending_in_one_line():
        run(arguments.file, arguments.out, arguments.scaling_factor, arguments.shift_factor)


def run(file: Path, out: Path, scaling_factor: float | None, shift_factor: float | None = None) -> None:
    """Converts, writes, and reads back what was written."""
    if scaling_factor is not None and not 0 < scaling_factor < float("inf"):
        raise UserError(f"--scaling-factor: expected a number above 0, got {scaling_factor}")
    if shift_factor is not None and not math.isfinite(shift_factor):
        raise UserError(f"--shift-factor: expected a number, got {shift_factor}")
    with phase("loading torch and diffusers"):
        from cfpretrain import autoencoder
        from cfpretrain.base import outputs
        from cfpretrain.export import foreign_files
        from cfpretrain.export.autoencoder import pick_tensors
    with phase(f"reading {file}"):
        tensors = pick_tensors(foreign_files.read(file, "FILE"))
        for name, values in tensors.items():
            foreign_files.check_finite(values, f"FILE: {file}: {name}")
    config, state = _convert(file, tensors, scaling_factor)
    config |= {} if shift_factor is None else {"shift_factor": shift_factor}
    network = autoencoder.fill_network(config, state, str(file))
    is_there = autoencoder.holds(out, network)
    if not is_there:
        with outputs.whole_or_nothing(out, "OUT") as unfinished:
            autoencoder.write_folder(unfinished, network)
    made = autoencoder.KLAutoencoder.load(out, "cpu", key="OUT")
    num_parameters = sum(value.numel() for value in tensors.values())
    say(
        f"{out}: {'already there: ' * is_there}{len(tensors)} tensors, {num_parameters:,} parameters; "
        f"{made.image_channels} channels and {made.stride} x {made.stride} pixels -> {made.latent_channels} channels"
    )
    say(f"fingerprint {made.fingerprint}")
    say(f"in a config: {made.scaling_overrides()}")


def _convert(
    file: Path, tensors: "Mapping[str, Tensor]", scaling_factor: float | None
) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """Config and state dict for diffusers' AutoencoderKL."""
    from cfpretrain.autoencoder import current_names, read_config
    from cfpretrain.export.autoencoder import from_ldm, recognise

    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        say("the tensors have diffusers' names: the config beside the file is taken")
        config, state = read_config(file.parent, "FILE"), current_names(tensors)
    else:
        config, state = from_ldm(tensors, str(file))
        known = recognise(config)
        if known is not None:
            say(f"the layout is that of {known[0]}: scaling factor {known[1]} unless --scaling-factor says otherwise")
            config["scaling_factor"] = known[1]
        elif scaling_factor is None:
            raise UserError(
                "--scaling-factor: expected what the latents of this autoencoder are multiplied by, since its layout "
                "is no published one; give it, or 1, and --shift-factor where there is one"
            )
    return config | ({} if scaling_factor is None else {"scaling_factor": scaling_factor}), state


if __name__ == "__main__":
    main()
