"""tools/evaluate_fid.py: the same scores on any ranks, from any kind of set, over kills; mistakes are one line."""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cfpretrain.base import runtime
from cfpretrain.base.console import EXIT_USER_ERROR, UserError
from cfpretrain.evaluation import array_files, scores
from cfpretrain.evaluation.feature_sums import Work
from cfpretrain.evaluation.features import FeatureExtractor
from cfpretrain.evaluation.given_images import open_images, say_sizes
from cfpretrain.evaluation.inception_score import class_sums, inception_score, splits_of
from cfpretrain.evaluation.neighbours import precision_recall
from cfpretrain.evaluation.references import STATISTICS_FILE, load_reference
from examples.digits.pixels import frechet_between
from tests import small_features
from tests.image_files import digits, write_folder, write_images
from tests.processes import run_in_processes, run_tool
from tests.runs import write_run

SCRIPT = "tools/evaluate_fid.py"
CPU = torch.device("cpu")
SMALL = ["--features", "tests.small_features:make"]
GENERATED, REAL = slice(0, 333), slice(700, 1101)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """generated.npz, generated/ and real/; tests read them only."""
    folder = tmp_path_factory.mktemp("sets")
    images = digits(0, 1797)
    np.savez(folder / "generated.npz", arr_0=images[GENERATED], arr_1=np.zeros(333, np.int64))
    np.savez_compressed(folder / "packed.npz", images[GENERATED])
    write_folder(folder / "generated", images[GENERATED])
    write_folder(folder / "real", images[REAL])
    return folder


run = partial(run_tool, SCRIPT)


def scored(folder: Path, arguments: Sequence[object], world_size: int = 1) -> dict[str, Any]:
    out = folder / "scores.json"
    out.unlink(missing_ok=True)
    ended = run([*arguments, "--out", out, "--cache", folder / "cache"], world_size)
    assert (ended.code, ended.err) == (0, "")
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def features(images: np.ndarray) -> tuple[torch.Tensor, ...]:
    return small_features.project(torch.from_numpy(images).permute(0, 3, 1, 2))


NAMES = ["fd_small", "fd_small_spatial", "inception_score_of_fd_small", "precision", "recall"]


@pytest.mark.parametrize(("world_size", "kind"), [(1, "generated.npz"), (2, "generated"), (4, "packed.npz")])
def test_scores_are_those_of_the_metrics_on_any_ranks_and_from_any_set(
    tmp_path: Path, sets: Path, world_size: int, kind: str
) -> None:
    result = scored(tmp_path, [sets / kind, "--reference", sets / "real", *SMALL], world_size)
    images = digits(0, 1797)
    generated, real = features(images[GENERATED]), features(images[REAL])
    expected = [
        frechet_between(real[0], generated[0]),
        frechet_between(real[1], generated[1]),
        inception_score(class_sums(generated[2], splits_of(333)))[0],
    ]
    # float32 features depend on the batch in their last bits; on ranks they must not.
    assert [result[name] for name in NAMES[:3]] == pytest.approx(expected, rel=1e-5)
    assert [result[name] for name in NAMES[3:]] == list(precision_recall(real[0], generated[0]))
    one_rank = scored(tmp_path, [sets / kind, "--reference", sets / "real", *SMALL])
    assert [result[name] for name in NAMES] == pytest.approx([one_rank[name] for name in NAMES], rel=1e-9)
    assert result["floor"]["fd_small"] < result["fd_small"]
    assert result["num_images"] == 333
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "scores.json"]


class KilledError(RuntimeError):
    """Stands for a kill."""


def sum_until(folder: Path, generated: Path, num_batches: int | None) -> list[float] | None:
    """Sums up on this rank's share; after so many batches the process is killed."""
    runtime.start(CPU)
    images, extractor = open_images(generated, "GENERATED"), small_features.make(CPU, None)
    work = Work(folder, "--out", {"images": images.fingerprint}, len(images), 32, save_seconds=0.0)
    num_left = num_batches

    def batches(numbers: list[int]) -> Any:
        nonlocal num_left
        for batch in images.batches(numbers):
            if num_left is not None:
                num_left -= 1
                if num_left < 0:
                    raise KilledError
            yield batch

    try:
        work.sum_up(batches, extractor)
    except KilledError:
        return None
    statistics = scores.statistics_of(work)
    assert statistics.neighbours_KF is not None
    assert statistics.inception_score is not None
    mean = statistics.pooled.mean_F.sum() + statistics.pooled.covariance_FF.sum()
    return [float(mean), float(statistics.neighbours_KF.sum()), *statistics.inception_score]


def test_kills_and_other_numbers_of_ranks_leave_no_trace(tmp_path: Path, sets: Path) -> None:
    (whole,) = run_in_processes(sum_until, 1, tmp_path / "whole", sets / "generated.npz", None)
    assert run_in_processes(sum_until, 1, tmp_path / "killed", sets / "generated.npz", 3) == [None]
    assert run_in_processes(sum_until, 2, tmp_path / "killed", sets / "generated.npz", 2) == [None, None]
    files = sorted(file.name for file in (tmp_path / ".killed.unfinished").glob("*.npz"))
    assert files == ["done.npz", "sums_000002_00000.npz", "sums_000002_00001.npz"]
    for made in run_in_processes(sum_until, 4, tmp_path / "killed", sets / "generated.npz", None):
        assert made == pytest.approx(whole, rel=1e-12)


def begin(out: Path, seed: int) -> None:
    """Begins some work, and ends with it unfinished."""
    Work(out, "--out", {"seed": seed}, 10, 2).begin()


def test_work_of_other_settings_is_refused(tmp_path: Path) -> None:
    run_in_processes(begin, 1, tmp_path / "work", 1)
    with pytest.raises(UserError, match=r"unfinished work of other settings \(seed: 1 there, 2 now\)"):
        begin(tmp_path / "work", 2)


def test_work_on_images_that_have_changed_starts_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Work(tmp_path / "work", "--out", {"images": "with a damaged one"}, 10, 2)
    first.begin()
    (first.folder / "rows_00000000.npy").touch()
    first._unfinished.release()
    second = Work(tmp_path / "work", "--out", {"images": "repaired"}, 9, 2)
    assert second.begin() == (1, [0, 1, 2, 3, 4])
    assert not (second.folder / "rows_00000000.npy").exists()
    assert (
        "other inputs than before (images: with a damaged one there, repaired now); starting over"
        in capsys.readouterr().out
    )


def test_a_rank_of_an_earlier_start_that_lives_on_is_not_counted(tmp_path: Path, sets: Path) -> None:
    images, extractor = open_images(sets / "generated.npz", "GENERATED"), small_features.make(CPU, None)

    def made() -> Work:
        return Work(tmp_path / "work", "--out", {}, 40, 8, save_seconds=0.0)

    def add(work: Work, number: int) -> None:
        work.add(number, extractor(images.read(work.ids(number))))

    first = made()
    assert first.begin() == (1, [0, 1, 2, 3, 4])
    add(first, 0)
    first._unfinished.release()  # of a machine that died, while another goes on
    second = made()
    assert second.begin() == (2, [1, 2, 3, 4])
    for number in (1, 2):
        add(second, number)
        add(first, number)
    second._unfinished.release()
    third = made()
    assert third.begin() == (3, [3, 4])
    add(third, 3)
    add(third, 4)
    (total,) = third.total()
    expected = features(images.read(range(40)).permute(0, 2, 3, 1).numpy())[0].double()
    assert total["pooled/sum_F"].tolist() == pytest.approx(expected.sum(0).tolist(), rel=1e-5)
    assert third.kept().shape == (40, 24)
    third.remove()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    first = Work(tmp_path / "work", "--out", {}, 10, 2)
    first.begin()
    with pytest.raises(UserError, match=r"--out: .*work is being written by another process"):
        Work(tmp_path / "work", "--out", {}, 10, 2).begin()
    first.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["settings.json", "sums_000001_00000.npz", "rows_00000001.npy"])
def test_damaged_work_is_named(tmp_path: Path, sets: Path, name: str) -> None:
    generated, out = sets / "generated.npz", tmp_path / "work"
    assert run_in_processes(sum_until, 1, out, generated, 3) == [None]
    (tmp_path / ".work.unfinished" / name).write_bytes(b"PK")
    with pytest.raises(RuntimeError, match=rf"{name} is damaged .*; delete .*\.work\.unfinished to begin again"):
        run_in_processes(sum_until, 2, out, generated, None)


# ---------------------------------------------------------------------------
# References


def load(path: Path, cache: Path, extractor: FeatureExtractor | None = None, counts: list[int] | None = None) -> Any:
    begun = [] if counts is None else counts
    return load_reference(path, extractor or small_features.make(CPU, None), cache, lambda *now: begun.append(now[1]))


def test_a_reference_is_read_once(tmp_path: Path, sets: Path) -> None:
    counts: list[int] = []
    first, second = (load(sets / "real", tmp_path, counts=counts) for _ in range(2))
    assert counts == [401]
    assert first.floor == second.floor
    assert torch.equal(first.statistics.pooled.covariance_FF, second.statistics.pooled.covariance_FF)
    load(sets / "real", tmp_path, small_features.make(CPU, Path("others")), counts)
    assert counts == [401, 401], "other features are other statistics"


def test_an_image_that_changes_is_read_again(tmp_path: Path, sets: Path) -> None:
    folder, counts = write_folder(tmp_path / "images", digits(0, 30)), list[int]()
    load(folder, tmp_path / "cache", counts=counts)
    Image.fromarray(digits(40, 1)[0]).save(folder / "all" / "00003.png")
    load(folder, tmp_path / "cache", counts=counts)
    assert counts == [30, 30]


def test_a_cache_that_does_not_match_is_refused(tmp_path: Path, sets: Path) -> None:
    load(sets / "real", tmp_path)
    (entry,) = tmp_path.iterdir()
    arrays = array_files.read_members(entry / STATISTICS_FILE)
    whole = json.loads(str(arrays.pop("cfpretrain")))

    def refused(note: dict[str, Any]) -> str:
        np.savez(entry / STATISTICS_FILE, cfpretrain=json.dumps(note), **arrays)
        with pytest.raises(UserError) as caught:
            load(sets / "real", tmp_path)
        return str(caught.value)

    others = whole | {"plan": whole["plan"] | {"images": "others"}}
    assert "holds statistics of other images or features; delete" in refused(others)
    for changed in ({"floor": 5}, {"floor": {"fid": "x"}}, {"inception_score": 5}, {"inception_score": [10**400, 1]}):
        assert "is damaged" in refused(whole | changed)
    assert "is damaged" in refused({})
    np.savez(entry / STATISTICS_FILE, **arrays)
    with pytest.raises(UserError, match="is damaged"):
        load(sets / "real", tmp_path)


def test_our_statistics_are_a_reference_for_the_same_features_alone(tmp_path: Path, sets: Path) -> None:
    reference = load(sets / "real", tmp_path)
    (entry,) = tmp_path.iterdir()
    given = load(entry / STATISTICS_FILE, tmp_path)
    assert torch.equal(given.statistics.pooled.mean_F, reference.statistics.pooled.mean_F)
    assert given.floor is None
    with pytest.raises(UserError, match=r"expected statistics of fd_small by this version, got .*give the images"):
        load(entry / STATISTICS_FILE, tmp_path, small_features.make(CPU, Path("others")))


def test_statistics_without_a_name_are_the_fid_inceptions(tmp_path: Path) -> None:
    """ADM's archives: distances by their statistics, neighbours by their images."""
    mean, covariance = np.arange(24.0), np.diag(np.arange(1.0, 25.0))
    np.savez(
        tmp_path / "adm.npz",
        arr_0=digits(0, 30),
        mu=mean,
        sigma=covariance,
        mu_s=mean[:12],
        sigma_s=covariance[:12, :12],
    )
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=covariance)
    fid = small_features.make_fid(CPU, None)
    both = load(tmp_path / "adm.npz", tmp_path / "cache", fid).statistics
    assert both.pooled.mean_F.tolist() == mean.tolist()
    assert both.spatial.covariance_FF.tolist() == covariance[:12, :12].tolist()
    assert both.neighbours_KF.shape == (30, 24)
    assert load(tmp_path / "statistics.npz", tmp_path / "cache", fid).statistics.neighbours_KF is None
    np.savez(tmp_path / "wide.npz", mu=np.zeros(30), sigma=np.eye(30))
    with pytest.raises(UserError, match="expected statistics of 24 features, as fid has, got 30 in "):
        load(tmp_path / "wide.npz", tmp_path / "cache", fid)
    images_only = load(tmp_path / "adm.npz", tmp_path / "cache").statistics
    assert images_only.pooled.mean_F.tolist() != mean.tolist()
    with pytest.raises(UserError, match="whose statistics are those of the FID Inception or of unknown features"):
        load(tmp_path / "statistics.npz", tmp_path / "cache")


def test_folders_are_read_as_shards_are_made_of_them(tmp_path: Path, sets: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(sets / "generated")
    Image.fromarray(digits(0, 1)[0]).save(folder / "one.tif")
    images = open_images(folder, "KEY")
    assert len(images) == 334
    assert images.read([333]).shape == (1, 3, 8, 8)
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"KEY: .*broken\.png cannot be read \(No such file or directory\); remove it"):
        open_images(folder, "KEY")


def test_shards_are_the_images_they_hold(tmp_path: Path, sets: Path) -> None:
    files = sorted((sets / "generated" / "all").iterdir())
    shards = open_images(write_images(tmp_path / "shards", [[file.read_bytes() for file in files]], 8), "KEY")
    folder = open_images(sets / "generated", "KEY")
    places = [0, 5, 332]
    assert torch.equal(shards.read(places), folder.read(places))
    assert len(shards) == 333


@pytest.mark.parametrize("name", ["images.npz", "IMAGES.NPZ"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_archives_of_either_order_and_case(name: str, order: Any, channels: int, tmp_path: Path) -> None:
    wanted = digits(0, 30, 16)[..., :channels].copy()
    wanted[:, 3, 2] = 77  # not the same when rows and columns change places
    with (tmp_path / name).open("wb") as file:
        np.savez_compressed(file, arr_0=np.asarray(wanted, order=order))
    images = open_images(tmp_path / name, "KEY")
    assert (len(images), images.size) == (30, (16, 16))
    found = images.read([29, 0, 7]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, (30, 16, 16, 3))[[29, 0, 7]])
    assert load(tmp_path / name, tmp_path / "cache").image_size == (16, 16)


def test_archives_that_are_cut_or_of_other_numbers_say_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        whole = io.BytesIO()
        np.save(whole, digits(0, 4))
        archive.writestr("arr_0.npy", whole.getvalue()[:-5])
    with pytest.raises(UserError, match=r"an array of shape \[4, 8, 8, 3\] and type uint8 takes 768 bytes, not 763"):
        open_images(tmp_path / "cut.npz", "KEY")
    np.savez(tmp_path / "floats.npz", arr_0=digits(0, 4) / 255)
    with pytest.raises(
        UserError, match=r"expected uint8 images \[N, Y, X, 3\] as .*, got float64 \[4, 8, 8, 3\]; write"
    ):
        open_images(tmp_path / "floats.npz", "KEY")


def test_half_of_given_statistics_is_refused(tmp_path: Path) -> None:
    pair = {"mu": np.arange(24.0), "sigma": np.eye(24)}
    for there, absent in (("mu", "sigma"), ("sigma", "mu"), ("mu_s", "sigma_s")):
        arrays = pair | {"mu_s": pair["mu"], "sigma_s": pair["sigma"]}
        del arrays[absent]
        np.savez(tmp_path / "half.npz", arr_0=digits(0, 30), **arrays)
        with pytest.raises(UserError, match=f"expected both .* in .*half.npz, got {there} alone; add the other"):
            load(tmp_path / "half.npz", tmp_path / "cache")


def test_what_is_transparent_is_scored_on_a_background(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an image set, too: hidden colours would be scored."""
    folder = write_folder(tmp_path / "images", digits(0, 30))
    for i in range(4):
        hidden = Image.new("RGBA", (8, 8), (0, 200, 0, 0))
        hidden.save(folder / "all" / f"{i:05d}.png")
    white, blue = open_images(folder, "KEY"), open_images(folder, "KEY", (0, 0, 255))
    assert white.fingerprint != blue.fingerprint
    assert white.read([0, 3]).eq(255).all()
    assert torch.equal(blue.read([1])[0, :, 0, 0], torch.tensor([0, 0, 255], dtype=torch.uint8))
    capsys.readouterr()
    first, second = (
        load_reference(folder, small_features.make(CPU, None), tmp_path / "cache", background=colour)
        for colour in ((255, 255, 255), (0, 0, 0))
    )
    assert first.record["fingerprint"] != second.record["fingerprint"]
    assert not torch.equal(first.statistics.pooled.mean_F, second.statistics.pooled.mean_F)
    said = capsys.readouterr().out
    for colour in ("white", "black"):
        words = "--reference: of the images read now, 4 images with transparency are composited on"
        assert f"{words} {colour} (--background)" in said


def test_images_that_are_not_read_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "images", digits(0, 5))
    for name in ("all/1.heic", "all/2.HEIC", "all/@eaDir/x.png", "labels.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"1")
    assert len(open_images(folder, "KEY")) == 5
    assert capsys.readouterr().out == (
        "[cfpretrain] WARNING: KEY: 2 images of a kind that is not read here (HEIC: 2) are left out: convert them, "
        "e.g. to PNG\n"
    )


def test_images_of_another_size_than_the_references_are_warned_of(
    sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_images(sets / "generated", "KEY").size == (8, 8)
    for size, reference, words in (
        ((8, 8), (16, 16), "16 x 16; for the features all are resized, and the scores"),
        ((8, 8), (16, 8), "16 x 8; for the features all are resized and squeezed to one shape, and the scores"),
    ):
        say_sizes(size, reference)
        said = capsys.readouterr().out
        assert said.startswith("[cfpretrain] WARNING: the images to score are 8 x 8, those of the reference 16 x ")
        assert words in said
    say_sizes((8, 8), (8, 8))
    say_sizes((8, 8), None)
    assert capsys.readouterr().out == ""


def test_the_command_says_what_images_lose_and_that_sizes_differ(tmp_path: Path, sets: Path) -> None:
    real = write_folder(tmp_path / "real", digits(700, 40, 16))
    for i in range(3):
        Image.new("RGBA", (16, 16), (0, 200, 0, 99)).save(real / "all" / f"{i:05d}.png")
    places = ["--out", tmp_path / "scores.json", "--cache", tmp_path / "cache"]
    ended = run([sets / "generated", "--reference", real, *SMALL, "--background", "#000", *places], world_size=2)
    assert (ended.code, ended.err) == (0, "")
    assert "--reference: of the images read now, 3 images with transparency are composited on black" in ended.out
    assert ended.out.count("WARNING: the images to score are 8 x 8, those of the reference 16 x 16; ") == 1


# ---------------------------------------------------------------------------
# Mistakes


def bad_sets(folder: Path) -> dict[str, Path]:
    mixed = write_folder(folder / "mixed", digits(0, 12))
    Image.fromarray(digits(9, 1, size=16)[0]).save(mixed / "all" / "00001.png")
    damaged = write_folder(folder / "damaged", digits(0, 12))
    (damaged / "all" / "00002.png").write_bytes(b"no image")
    one = write_folder(folder / "one", digits(0, 1))
    (folder / "empty").mkdir()
    np.savez(folder / "keys.npz", images=digits(0, 3))
    np.savez(folder / "floats.npz", digits(0, 3).astype(np.float32))
    np.savez(folder / "objects.npz", mu=np.array([{}], object), sigma=np.zeros((1, 1)))
    np.savez(
        folder / "shapes.npz",
        cfpretrain=np.array('{"features": "small None", "name": "", "made_by": "", "num_images": 9}'),
        mu=np.zeros(3),
        sigma=np.zeros((2, 2)),
    )
    (folder / "text.npz").write_text("no archive")
    names = ("keys.npz", "floats.npz", "objects.npz", "shapes.npz", "text.npz", "empty", "absent")
    return {"mixed": mixed, "damaged": damaged, "one": one, **{name: folder / name for name in names}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixed", "--reference: expected images of one size, got 16 x 16 in "),
        ("damaged", "00002.png: no image of a known kind"),
        ("one", "--reference: expected at least 2 images in "),
        ("empty", "got 0; give more"),
        ("absent", "which is nothing: it does not exist"),
        ("keys.npz", "or mu and sigma (statistics), got "),
        ("floats.npz", "got float32 [3, 8, 8, 3]; write them so"),
        ("objects.npz", "values of type object, which are pickled"),
        ("shapes.npz", "expected a finite vector mu and its square sigma in "),
        ("text.npz", "expected an .npz archive, got "),
    ],
)
def test_sets_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(bad_sets(tmp_path)[name], tmp_path / "cache")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_end_all_ranks_with_one_line(tmp_path: Path, sets: Path) -> None:
    bad = bad_sets(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"")
    good = [sets / "generated.npz", "--reference", sets / "real"]
    for arguments, message in (
        ([bad["absent"], "--reference", sets / "real", *SMALL], "GENERATED: expected a folder of images, image shards"),
        ([bad["mixed"], "--reference", sets / "real", *SMALL], "GENERATED: expected images of one size"),
        ([*good, *SMALL, "--num-images", 7], "--num-images: expected 333, the images of "),
        ([*good, "--features", "inception"], "--feature-weights: expected the file of the FID Inception's weights"),
        ([*good, "--features", "dino"], "--features: expected inception, effnet_lite0 or module:function, got 'dino'"),
        ([*good, "--features", "tests.small_features:make_fid"], "--features: expected a FeatureExtractor with a name"),
        ([*good, "--features", "tests.small_features:make_nan"], "fd_nan: expected finite features, got NaN"),
        ([*good, "--out", tmp_path / "no" / "out.json"], "--out: expected a place in a folder that is there"),
        ([*good, "--out", tmp_path], "--out: expected a file, got the folder "),
    ):
        ended = run(
            [
                *arguments,
                *([] if "--out" in arguments else ["--out", tmp_path / "out.json"]),
                "--cache",
                tmp_path / "c",
            ],
            2,
        )
        assert ended.code == EXIT_USER_ERROR, arguments
        assert f"[cfpretrain] error: {message}" in ended.err
        assert ended.err.count("\n") == 1


# ---------------------------------------------------------------------------
# Of a model


def test_a_models_images_are_scored_as_if_they_had_been_written(tmp_path: Path, shards: Path, sets: Path) -> None:
    source = write_run(tmp_path / "run", shards)
    how = ["--solver", "ddim", "--num-denoising-steps", "2", "--batch-size", "8", "--num-images", 30, "--guidance", 2]
    ended = run_tool("tools/sample.py", [source, "--out", tmp_path / "made.npz", *how])
    assert (ended.code, ended.err) == (0, "")
    stored = scored(tmp_path, [tmp_path / "made.npz", "--reference", sets / "real", *SMALL])
    arguments = [source, "--reference", sets / "real", *SMALL, *how]
    direct = scored(tmp_path, arguments)
    assert [direct[name] for name in NAMES] == pytest.approx([stored[name] for name in NAMES], rel=1e-5)
    for world_size in (2, 4):
        on_ranks = scored(tmp_path, arguments, world_size)
        assert [on_ranks[name] for name in NAMES] == pytest.approx([direct[name] for name in NAMES], rel=1e-9)
    again = [*arguments, "--out", tmp_path / "scores.json", "--cache", tmp_path / "cache"]
    assert "nothing to do: " in run(again, 2).out
    refused = run([*again, "--guidance", "3"], 2)
    assert "scores.json holds scores of other settings already (guidance: " in refused.err
    [statistics] = (tmp_path / "cache").glob("*/statistics.npz")
    beside_statistics = scored(tmp_path, [tmp_path / "made.npz", "--reference", statistics, *SMALL])
    assert beside_statistics["fd_small"] == stored["fd_small"]
    assert beside_statistics["floor"] is None
    other = scored(tmp_path, [*arguments, "--labels", "random"])
    assert other["settings"]["labels"] == "random"
    assert other["fd_small"] != direct["fd_small"]
    assert not os.path.lexists(tmp_path / ".scores.json.unfinished")
