"""Makes a folder of wheels with which cfpretrain installs on machines without a network, beside their own torch.

    make wheelhouse PYTHON=3.12

runs `python tools/make_wheelhouse.py --python 3.12 --out wheelhouse-3.12` where there is a network, with any Python. On
the other machine: `pip install --no-index --find-links wheelhouse-3.12 cfpretrain`.

In the folder is all that cfpretrain requires, in the versions of constraints.txt, but for torch and what comes with it:
those are gigabytes, and belong to the machine's driver. Fewer wheels would do to train from local shards, but pip
refuses to install without the others; and what a machine has already, in a version that is allowed, pip leaves alone.
"""

import email.parser
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from cfpretrain.base.command_line import Parser
from cfpretrain.base.console import UserError, ending_in_one_line, path_argument, phase, say

REPOSITORY = Path(__file__).resolve().parent.parent
_PYTHONS = ("3.11", "3.12", "3.13")
# They are built against one torch, and torch against one CUDA: the machine's. (What torch alone requires, NVIDIA's
# libraries above all, is not reached without it.)
OF_THE_MACHINE = {"torch", "torchvision", "triton"}
# The index has no wheel of it. With DS_BUILD_OPS=0 its operators, which are not used here, stay uncompiled, and it is
# plain Python.
NO_WHEEL = {"deepspeed"}
# Torch's own wheels ask for glibc 2.28. What was made for an older one runs there too, but pip takes only tags that are
# named.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]

# Names -> their requirements.
Read = Callable[[set[str]], Mapping[str, Iterable[Requirement]]]


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("--python", required=True, metavar="3.12", help="version of Python there")
    parser.add_argument("--out", type=path_argument, required=True, help="a folder that is not there yet, or empty")
    arguments = parser.parse_args()
    with ending_in_one_line():
        run(arguments.python, arguments.out)


def run(python: str, out: Path) -> None:
    """Downloads and builds, from cfpretrain's requirements to theirs, and checks that all can be installed there."""
    if python not in _PYTHONS:
        raise UserError(
            f"--python: expected {', '.join(_PYTHONS)}, got {python}; with make: make wheelhouse PYTHON=3.12"
        )
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: expected a folder that is not there yet, or empty, got {out}; choose another")
    pins = read_pins(REPOSITORY / "constraints.txt")

    def read(names: set[str]) -> dict[str, list[Requirement]]:
        with phase(f"fetching {', '.join(sorted(names))}"):
            _fetch(names, pins, python, out)
        wheels = {parse_wheel_filename(wheel.name)[0]: wheel for wheel in out.glob("*.whl")}
        return {name: _requirements(wheel) for name, wheel in wheels.items() if name in names}

    needed({"cfpretrain"}, read, python)
    wheels = sorted(out.glob("*.whl"))
    check(wheels, python)
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    say(f"{len(wheels)} wheels, {megabytes:.0f} MB: pip install --no-index --find-links {out} cfpretrain")


def needed(names: set[str], read: Read, python: str) -> set[str]:
    """These packages and all that they require, directly or not, but for what is the machine's.

    Args:
        names: in canonical form.
        read: is asked once for each name, and again where more of its extras are asked for.
        python: version whose requirements count, e.g. "3.12".
    """
    # For the rest (system, processor, implementation), the other machine is like this one.
    there = {"python_version": python, "python_full_version": f"{python}.0"}
    extras: dict[str, set[str]] = {name: set() for name in names}
    layer = set(names)
    while layer:
        found = [
            requirement
            for name, requirements in read(layer).items()
            for requirement in requirements
            if requirement.marker is None
            or any(requirement.marker.evaluate(there | {"extra": extra}) for extra in ("", *extras[name]))
        ]
        layer = set()
        for requirement in found:
            name = canonicalize_name(requirement.name)
            if name not in OF_THE_MACHINE and (name not in extras or not requirement.extras <= extras[name]):
                extras.setdefault(name, set()).update(requirement.extras)
                layer.add(name)
    return set(extras)


def read_pins(constraints: Path) -> dict[str, str]:
    """The version of each package in a file of constraints."""
    pins = [Requirement(line) for line in constraints.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def check(wheels: Iterable[Path], python: str) -> None:
    """Checks that Python of this version takes these wheels on another machine, one of `PLATFORMS`."""
    major, minor = map(int, python.split("."))
    tags = {*cpython_tags((major, minor), platforms=PLATFORMS)}
    tags |= {*compatible_tags((major, minor), f"cp{major}{minor}", PLATFORMS)}
    for wheel in wheels:
        if not parse_wheel_filename(wheel.name)[3] & tags:
            raise UserError(f"{wheel.name} does not install on Python {python}; an operator was compiled on the way?")


def _fetch(names: set[str], pins: Mapping[str, str], python: str, out: Path) -> None:
    here = [str(REPOSITORY)] if "cfpretrain" in names else []
    specs = {name: f"{name}=={pins[name]}" if name in pins else name for name in names - {"cfpretrain"}}
    built = here + [spec for name, spec in specs.items() if name in NO_WHEEL]
    if built:
        _pip("wheel", "--wheel-dir", str(out), *built)
    downloaded = [spec for name, spec in specs.items() if name not in NO_WHEEL]
    if downloaded:
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        where = ["--only-binary=:all:", "--python-version", python, *platforms]
        _pip("download", "--dest", str(out), *where, *downloaded)


def _pip(command: str, *arguments: str) -> None:
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    words = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    if subprocess.run(words, env=environment).returncode:
        raise UserError(f"pip {command} failed; what it wrote stands above")


def _requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        message = email.parser.BytesParser().parsebytes(archive.read(name), headersonly=True)
    return [Requirement(text) for text in message.get_all("Requires-Dist", [])]


if __name__ == "__main__":
    main()
