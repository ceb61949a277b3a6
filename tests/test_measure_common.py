"""tools/measuring/common.py: shards of noise fit any recipe; sides take turns."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.data.loader import Loader
from cfpretrain.data.shards import read_info
from tests.processes import REPOSITORY
from tools import measure as command
from tools.measuring import common


@pytest.mark.parametrize(
    ("preset", "overrides", "has_posterior", "has_mirror"),
    [
        ("tiny", (), False, False),
        ("tiny", ("data.mirror_prob=0.5",), False, False),  # pixels are flipped
        ("demo", (), True, False),
        ("XL", (), True, True),
    ],
)
def test_shards_of_noise_fit_the_recipe(
    tmp_path: Path, preset: str, overrides: tuple[str, ...], has_posterior: bool, has_mirror: bool
) -> None:
    small = ("train.global_batch_size=8", "train.micro_batch_size=4", "data.num_workers=0", *overrides)
    config = configs.load(REPOSITORY / "configs" / f"{preset}.yaml", small)
    config = common.on_noise(config, tmp_path)
    config_checks.check(config, 1)
    info = read_info(tmp_path / "latents")
    assert (info.has_posterior, info.has_mirror) == (has_posterior, has_mirror)
    model = config.model
    with closing(Loader(config, lambda samples, step: samples, 0, 1)) as loader:
        batches = [next(loader) for _ in range(info.num_samples // 8 + 1)]  # an epoch and more
    shape = (4, model.latent_channels, model.latent_size, model.latent_size)
    assert all(one.latents_BCYX.shape == shape and one.latents_BCYX.isfinite().all() for b in batches for one in b)
    assert (config.metrics.wandb, config.run.folder) == ("disabled", str(tmp_path / "run"))


def test_the_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["machine"])
    found = json.loads(capsys.readouterr().out)
    assert found["matmul_tflops"] > 0
    assert found["versions"]["torch"]
    assert found["hardware"]["cores"] >= 1


def test_sides_take_turns() -> None:
    made: list[str] = []

    def side(name: str) -> Callable[[], float]:
        return lambda: float(made.append(name) or len(made))

    found = common.alternate({"a": side("a"), "b": side("b")}, 3)
    assert "".join(made) == "ba" + "ab" + "ba" + "ab"  # the first turn does not count
    assert found == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_rates_are_compared_by_their_medians(capsys: pytest.CaptureFixture[str]) -> None:
    found = common.print_rates({"ours": [2.0, 4.0, 9.0], "plain": [1.0, 2.0, 5.0]}, "images/s")
    assert found["ratio"] == 2
    assert f"{'ours':28}      4.00 images/s (2.00 to 9.00)\n" in capsys.readouterr().out


@pytest.mark.parametrize("what", command._OPTIONS)
def test_help_is_there_before_torch_and_fits_a_screen(what: str) -> None:
    program = "import sys; sys.modules['torch'] = None; from tools.measure import main; main([sys.argv[1], '--help'])"
    ended = subprocess.run([sys.executable, "-c", program, what], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"usage: measure.py {what} ")
    assert len(ended.stdout.splitlines()) <= 60


def test_an_unknown_measurement_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["nothing"], []):
        with pytest.raises(SystemExit, match="2"):
            command.main(given)
        err = capsys.readouterr().err
        assert err.startswith("[cfpretrain] error: ")
        assert "WHAT" in err
        assert err.count("\n") == 1
