"""What belongs into a wheelhouse, and what a machine takes of it; the real one is made by `make wheelhouse`."""

import ast
import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cfpretrain.base.console import UserError
from tests.processes import REPOSITORY
from tools import make_wheelhouse


def declared() -> list[Requirement]:
    """`install_requires` of setup.py."""
    [found] = [
        node.value
        for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    ]
    return [Requirement(text) for text in ast.literal_eval(found)]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_all_that_is_required_is_in_it_and_pinned_and_torch_is_not(python) -> None:
    """From the metadata of the packages that are installed for the tests."""

    def read(names: set[str]) -> dict[str, list[Requirement]]:
        return {
            name: declared()
            if name == "cfpretrain"
            else list(map(Requirement, importlib.metadata.requires(name) or []))
            for name in names
        }

    found = make_wheelhouse.needed({"cfpretrain"}, read, python)
    ours = {canonicalize_name(requirement.name) for requirement in declared()}
    assert ours - found == {"torch"}
    assert {"boto3", "huggingface-hub", "pyyaml"} <= found  # of mosaicml-streaming, diffusers, omegaconf
    assert not [name for name in found if name.startswith(("torch", "nvidia-", "cuda-", "triton"))]
    assert found - make_wheelhouse.read_pins(REPOSITORY / "constraints.txt").keys() == {"cfpretrain"}


def test_markers_and_extras_are_those_of_the_other_python() -> None:
    index = {
        "a": ["old; python_version < '3.12'", "new; python_version >= '3.12'", "B.b[more]", "torch"],
        "b-b": ["plain", "extra; extra == 'more'", "other; extra == 'most'", "c"],
        "c": ["b-b[most]"],  # asked for again, with another extra
        **{name: [] for name in ("old", "new", "plain", "extra", "other")},
    }

    def read(names: set[str]) -> dict[str, list[Requirement]]:
        return {name: list(map(Requirement, index[name])) for name in names}

    common = {"a", "b-b", "c", "plain", "extra", "other"}
    assert make_wheelhouse.needed({"a"}, read, "3.11") == common | {"old"}
    assert make_wheelhouse.needed({"a"}, read, "3.13") == common | {"new"}


def test_only_wheels_that_fit_the_other_machine_pass() -> None:
    good = ["cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64", "cp38-abi3-manylinux_2_28_x86_64"]
    good += ["cp312-cp312-manylinux_2_5_x86_64", "py3-none-manylinux2014_x86_64", "py3-none-any", "py2.py3-none-any"]
    make_wheelhouse.check([Path(f"some-1.0-{tags}.whl") for tags in good], "3.12")
    bad = ["cp311-cp311-manylinux_2_17_x86_64", "cp312-cp312-manylinux_2_39_x86_64", "cp312-cp312-linux_x86_64"]
    for tags in [*bad, "cp313-abi3-manylinux_2_17_x86_64", "cp312-cp312-macosx_11_0_arm64"]:
        with pytest.raises(UserError, match=r"some-1\.0-.* does not install on Python 3\.12"):
            make_wheelhouse.check([Path(f"some-1.0-{tags}.whl")], "3.12")


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--python: expected 3\.11, 3\.12, 3\.13, got python3; with make: make "):
        make_wheelhouse.run("python3", tmp_path / "out")
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="--out: expected a folder that is not there yet, or empty"):
        make_wheelhouse.run("3.12", tmp_path)
