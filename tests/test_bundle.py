"""One file of many modules: it means what they mean, imports nothing that its users may lack, or is refused."""

import ast
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfpretrain.core import attention, norm
from cfpretrain.core import model as transformer
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import build_layout
from cfpretrain.evaluation import sampling_options
from cfpretrain.export import bundle as bundles
from cfpretrain.export import plain, plain_files
from cfpretrain.export.bundle import BundleError, bundle, content_name
from cfpretrain.export.plain import STAND_INS
from tests.test_model import small_model

# ---------------------------------------------------------------------------------------------------------------------
# Small packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package; modules are written into it."""
    monkeypatch.setattr(bundles, "_ROOT", tmp_path)
    return tmp_path


def write(package: Path, **modules: str) -> None:
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text)


def run(text: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "joined"}
    exec(compile(text, "joined", "exec"), scope)
    return scope


LOW = '''"""Counts."""

import math
from collections import OrderedDict

# How many.
SIZE = 3
_BASE = 10


def twice(number: int) -> int:
    return 2 * number + _BASE


def unused() -> float:
    return math.pi + len(OrderedDict())
'''


def test_modules_are_taken_whole_with_their_comments(package: Path) -> None:
    high = '"""Asks."""\nfrom cfpretrain.low import SIZE, twice\n\n\ndef ask() -> int:\n    return twice(SIZE)\n'
    write(package, low=LOW, high=high)
    text = bundle("cfpretrain.high")
    assert run(text)["ask"]() == 16
    assert "# How many.\nSIZE = 3" in text
    assert "# Counts." in text
    assert text.index("import math") < text.index("def unused") < text.index("def ask")
    assert text.count("def twice") == 1


def test_a_module_used_as_a_module_keeps_its_name(package: Path) -> None:
    """`key` is a variable of the one that calls `low.key`."""
    low = '"""Low."""\n\n\ndef key(text: str) -> str:\n    return text + "!"\n\n\ndef other() -> None:\n    pass\n'
    high = '"""High."""\nfrom cfpretrain import low\n\n\ndef ask() -> str:\n    key = low.key("a")\n    return key\n'
    write(package, low=low, high=high)
    assert run(bundle("cfpretrain.high"))["ask"]() == "a!"


def test_a_stand_in_takes_a_modules_place(package: Path) -> None:
    high = '"""High."""\nfrom cfpretrain.low import twice\n\n\ndef ask() -> int:\n    return twice(1)\n'
    stand_in = '"""Plain."""\n\n\ndef twice(number: int) -> int:\n    return -number\n'
    write(package, low=LOW, high=high, plain=stand_in)
    text = bundle("cfpretrain.high", {"cfpretrain.low": "cfpretrain.plain"})
    assert run(text)["ask"]() == -1
    assert "_BASE" not in text


def test_imports_are_gathered(package: Path) -> None:
    low = '"""Low."""\nfrom typing import Any\nimport json as j\n\n\ndef a(x: Any) -> str:\n    return j.dumps(x)\n'
    high = (
        '"""High."""\nimport os.path\nfrom typing import NamedTuple\n\nimport torch\nfrom cfpretrain.low import a\n\n\n'
        "class Pair(NamedTuple):\n    x: str = os.path.join(a(1), str(torch.pi))\n"
    )
    write(package, low=low, high=high)
    text = bundle("cfpretrain.high")
    expected = ["from typing import Any", "from typing import NamedTuple", "import json as j", "import os.path"]
    assert text.split('"""')[2].strip().splitlines()[:5] == [*expected, "import torch"]
    assert run(text)["Pair"]().x.startswith("1/3.14")


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ("def f(): ...\ndef g(): f()", "from cfpretrain.low import g\ndef f(): g()", r"f of cfpretrain.\w+ clashes"),
        (
            "import math as f\ng = f.pi",
            "from cfpretrain.low import g\nf = g",
            "f of cfpretrain.high clashes with f of import math",
        ),
        ("def f(): ...", "from cfpretrain import low\ndef x(): low.f()\ntypes = 1", "types of cfpretrain.high clashes"),
        (
            "def f(): ...",
            "from cfpretrain.low import f\ndef f(): f()",
            "f of cfpretrain.high clashes with f of cfpretrain.low",
        ),
        (
            "def hash(): ...",
            "from cfpretrain.low import hash\nx = hash()",
            "hash of cfpretrain.low clashes with hash of python itself",
        ),
        ("import math as m\nf = m.pi", "import cmath as m\nfrom cfpretrain.low import f\nx = m.pi + f", "clash"),
        ("def f(): ...\ndef f(): ...", "from cfpretrain.low import f\nx = f", "f of cfpretrain.low clashes"),
        ("def f(): ...", "from cfpretrain.low import f as g\nx = g", "cannot be joined"),
        ("def f(): ...", "import cfpretrain.low\nx = 1", "cannot be joined"),
        ("def f(): ...", "from cfpretrain.low import g\nx = g", "uses g of cfpretrain.low, which does not define it"),
        ("def f(): ...", "def g():\n    from cfpretrain.low import f\n    f()", "cfpretrain.low cannot be imported"),
        ("def f(): ...", "x = 1\nfor y in range(x): ...", "line 3: only imports and definitions"),
        ("def f(): ...", "def g():\n    import apex\n", "apex cannot be imported everywhere"),
        ("def f(): ...", "from omegaconf import OmegaConf\nx = OmegaConf", "omegaconf cannot be imported everywhere"),
        ("from cfpretrain.high import x\nf = x", "from cfpretrain.low import f\nx = 1\ny = f", "import one another"),
    ],
)
def test_what_would_mean_something_else_is_refused(package: Path, low: str, high: str, message: str) -> None:
    write(package, low=f'"""Low."""\n{low}\n', high=f'"""High."""\n{high}\n')
    with pytest.raises(BundleError, match=message):
        bundle("cfpretrain.high")


def test_a_name_follows_from_the_content() -> None:
    assert content_name("pipeline", "a") == content_name("pipeline", "a") != content_name("pipeline", "b")
    assert re.fullmatch(r"pipeline_[0-9a-f]{16}", content_name("pipeline", "a"))


# ---------------------------------------------------------------------------------------------------------------------
# The real one


def test_the_joined_network_computes_the_same_bits() -> None:
    """The scope has nothing but what the text defines."""
    scope = run(bundle("cfpretrain.core.model", STAND_INS))
    ours = small_model()
    theirs = scope["CausalFusion"](
        grid=3, patch_values=4, width=16, depth=2, num_heads=2, num_cond_tokens=2, num_classes=5
    )
    theirs.load_state_dict(ours.state_dict())
    steps = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2]])
    intervals = build_layout([class_segment(2), image_segment(steps)]).intervals_BMI
    clean, noised, positions = torch.randn(2, 6, 4), torch.randn(2, 9, 4), torch.randperm(9).expand(2, -1)

    def forward(names: dict[str, Any], model: nn.Module) -> Tensor:
        times = torch.tensor([3, 900])
        image = names["Segment"]("image", clean=clean, noised=noised, positions_BL=positions, times_B=times)
        return model([names["Segment"]("class", clean=torch.tensor([1, 4])), image], intervals)["image"]

    assert torch.equal(forward(scope, theirs), forward(vars(transformer), ours))


# What stands in for modules in each file of an export, and which packages it may need.
TEMPLATES: dict[str, tuple[dict[str, str], set[str]]] = {
    "transformer_template": (STAND_INS, {"torch", "diffusers"}),
    "pipeline_template": ({}, {"torch", "diffusers", "numpy", "PIL"}),
    "tokenizer_template": (plain_files.STAND_INS, {"tokenizers"}),
}


@pytest.mark.parametrize("module", TEMPLATES)
def test_every_name_in_an_export_is_defined(module: str, tmp_path: Path) -> None:
    text = bundle(f"cfpretrain.export.{module}", TEMPLATES[module][0])
    assert not re.search(r"\b(from|import) cfpretrain", text)
    (tmp_path / "joined.py").write_text(text)
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or "ruff"
    command = [ruff, "check", "--isolated", "--select", "F,E9", "--no-cache", str(tmp_path / "joined.py")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_what_is_left_out_means_the_same_as_on_the_command_line() -> None:
    text = bundle("cfpretrain.export.pipeline_template")
    values = {
        statement.targets[0].id: statement.value
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    assert ast.literal_eval(values["_BY_SOLVER"]) == sampling_options._BY_SOLVER


@pytest.mark.parametrize("module", TEMPLATES)
def test_diffusers_finds_no_package_to_install(module: str) -> None:
    """It looks for imports line by line, in docstrings too; the package named apex on the registry is not NVIDIA's."""
    stand_ins, packages = TEMPLATES[module]
    text = bundle(f"cfpretrain.export.{module}", stand_ins)
    found = re.findall(r"^\s*import\s+(\S+)\s*$", text, re.MULTILINE)
    found += re.findall(r"^\s*from\s+(\S+)\s+import", text, re.MULTILINE)
    assert {name.split(".")[0] for name in found} - sys.stdlib_module_names <= packages


def test_stand_ins_compute_the_same() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8).unbind(0)
    intervals = torch.tensor([[[0, 3, 3, 5]] * 7], dtype=torch.int32)
    for given, num_kv_heads in itertools.product((None, intervals), (4, 2)):
        qkv = (q, k[:, :num_kv_heads], v[:, :num_kv_heads])
        expected = attention.attend(*qkv, attention.make_visibility(given, 7, "sdpa"))
        assert torch.equal(plain.attend(*qkv, plain.make_visibility(given, 7, "sdpa")), expected)
    assert str(plain.layer_norm(8)) == str(norm.layer_norm(8))
    for kind in ("layer", "rms"):
        assert str(plain.make_norm(kind, 8, 1e-3)) == str(norm.make_norm(kind, 8, 1e-3))
