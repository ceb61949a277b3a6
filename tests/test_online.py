"""Training from image shards: the batches are those of the latent shards that encode_latents makes of them."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder, make_network, write_folder
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.latents import LatentScaling
from cfpretrain.data import reader
from cfpretrain.data.loader import Loader, Position
from cfpretrain.data.online import EncodingReader
from cfpretrain.data.samples import Samples
from tests.closeness import disagreement
from tests.image_files import encoded, write_images
from tests.latent_shards import as_read, config_for
from tests.processes import REPOSITORY, shared_memory, wait_until
from tests.test_latent_shards import CONFIG, encoding_of, write, write_autoencoder
from tests.test_loader import UNCLOSED
from tests.test_pixels import crops

SIZE, BATCH = 16, 8  # of the images; in which they are encoded
FOLDERS = ((9, 4, 17), (11, 1))  # images of the shards of two folders
NUM_STEPS = 5  # over an epoch of 72 visits, into the next


@dataclass(frozen=True)
class Pair:
    """Folders of images, and of the latents that encode_latents makes of them."""

    images: list[Path]
    latents: list[Path]
    settings: dict[str, Any]  # of a config for both

    def config(self, kind: str = "images", **settings: Any) -> Config:
        given = {"mirror_prob": 0.5, "repeat": (1.5, 2.25), "encode_batch_size": BATCH} | self.settings | settings
        config = config_for(getattr(self, kind), **given)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=2))


def make_pair(root: Path, kind: str) -> Pair:
    """Real photos, through a small autoencoder with random weights ("kl") or as pixels, "grey" or "rgb"."""
    channels = 1 if kind == "grey" else 3
    photos = [photo.convert("L" if channels == 1 else "RGB") for photo in crops(sum(map(sum, FOLDERS)), SIZE)]
    files = iter(map(encoded, photos))
    images = [
        write_images(
            root / f"images{n}", [[next(files) for _ in range(size)] for size in sizes], SIZE, channels=channels
        )
        for n, sizes in enumerate(FOLDERS)
    ]
    if kind == "kl":
        folder = write_autoencoder(root / "autoencoder")
        autoencoder: Any = KLAutoencoder.load(folder, "cpu")
        settings = {"shape": (4, 8, 8), "autoencoder": str(folder)}
    else:
        autoencoder = IdentityAutoencoder(LatentScaling([0.5] * channels, [2.0] * channels))
        settings = {"shape": (channels, SIZE, SIZE)}
    latents = [
        write(
            encoding_of(folder, autoencoder, batch_size=BATCH),
            root / f"latents{n}",
            parts=(range(len(FOLDERS[n])),),
            num_threads=1,
        )
        for n, folder in enumerate(images)
    ]
    scaling = {"latent_shift": tuple(autoencoder.shift), "latent_scale": tuple(autoencoder.scale)}
    return Pair(images, latents, settings | scaling)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Gives folders of a kind; tests read them only."""
    made: dict[str, Pair] = {}

    def pair(kind: str) -> Pair:
        if kind not in made:
            made[kind] = make_pair(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return pair


@dataclass(frozen=True)
class Visited:
    """Steps of all ranks."""

    latents: dict[tuple[int, int, int], Tensor]  # by step, epoch and id: float32 [C, Y, X]
    labels: dict[tuple[int, int, int], int]
    after: Position


def take(loader: Loader[Samples], num_steps: int = 3) -> list[Samples]:
    return [batch for _ in range(num_steps) for batch in next(loader)]


def visit(config: Config, world_size: int, num_steps: int, position: Position | None = None, step: int = 0) -> Visited:
    """Reads steps; ranks, which share nothing, run one after another."""
    latents, labels, positions = {}, {}, set()
    for rank in range(world_size):
        with closing(Loader(config, as_read, rank, world_size, position, step)) as loader:
            for number in range(step, step + num_steps):
                for batch in next(loader):
                    keys = [(number, batch.epoch, i) for i in batch.ids_B.tolist()]
                    latents |= zip(keys, batch.latents_BCYX, strict=True)
                    labels |= zip(keys, batch.labels_B.tolist(), strict=True)
            positions.add(loader.position)
    return Visited(latents, labels, *positions)


def assert_equal(found: Visited, wanted: Visited) -> None:
    assert found.latents.keys() == wanted.latents.keys()
    assert found.labels == wanted.labels
    assert found.after == wanted.after
    different = [key for key, latent in wanted.latents.items() if not torch.equal(found.latents[key], latent)]
    assert not different


# ---------------------------------------------------------------------------------------------------------------------
# The batches


@pytest.mark.parametrize("kind", ["kl", "grey", "rgb"])
def test_batches_are_those_of_latent_shards(pairs: Any, kind: str) -> None:
    """To the last bit, mirrors and repetitions too, for any ranks, micro-batches and workers."""
    pair = pairs(kind)
    wanted = visit(pair.config("latents", micro_batch_size=24), 1, NUM_STEPS)
    assert len(wanted.latents) == 24 * NUM_STEPS
    assert wanted.after.epoch == 1
    assert len({i >> 56 for _, _, i in wanted.latents}) == 3
    for world_size, micro, num_workers in ((1, 24, 0), (1, 3, 2), (2, 12, 1), (4, 6, 0)):
        config = pair.config(micro_batch_size=micro, num_workers=num_workers)
        assert_equal(visit(config, world_size, NUM_STEPS), wanted)


def test_another_size_of_the_padded_batch_is_within_the_rounding_of_float16(pairs: Any) -> None:
    pair = pairs("kl")
    wanted = visit(pair.config("latents", micro_batch_size=24), 1, 2)
    expected = torch.stack(list(wanted.latents.values()))
    for encode_batch_size in (1, 5, 32):
        found = visit(pair.config(micro_batch_size=12, encode_batch_size=encode_batch_size), 2, 2)
        assert found.labels == wanted.labels
        assert disagreement(torch.stack([found.latents[key] for key in wanted.latents]), expected) < 2e-3


def test_mirrors_are_drawn_as_often_as_said(pairs: Any) -> None:
    pair = pairs("rgb")
    plain, mirrored, some = (visit(pair.config(mirror_prob=share), 1, 3).latents for share in (0.0, 1.0, 0.5))
    turned = [key for key in some if torch.equal(some[key], mirrored[key])]
    assert all(torch.equal(mirrored[key], plain[key].flip(-1)) for key in plain)
    assert all(torch.equal(some[key], plain[key]) for key in some.keys() - set(turned))
    assert 16 < len(turned) < 56  # of 72 fair coins: nearly five standard deviations


# ---------------------------------------------------------------------------------------------------------------------
# The position


@pytest.mark.parametrize(("first", "then"), [((1, 24, 2), (2, 4, 0)), ((4, 3, 0), (1, 12, 1)), ((2, 12, 1), (4, 6, 2))])
def test_a_resume_goes_on_after_what_was_handed_out(pairs: Any, first: Any, then: Any) -> None:
    """In the middle of an epoch, on other ranks, while further images are being made."""
    pair = pairs("kl")
    wanted = visit(pair.config("latents", micro_batch_size=24), 1, NUM_STEPS)
    (world_size, micro, num_workers), (others, other_micro, other_workers) = first, then
    begun = visit(pair.config(micro_batch_size=micro, num_workers=num_workers), world_size, 2)
    assert begun.after == Position(0, 48)
    config = pair.config(micro_batch_size=other_micro, num_workers=other_workers)
    rest = visit(config, others, NUM_STEPS - 2, begun.after, 2)
    assert_equal(Visited(begun.latents | rest.latents, begun.labels | rest.labels, rest.after), wanted)


def test_the_position_counts_what_was_handed_out(pairs: Any) -> None:
    with closing(Loader(pairs("grey").config(micro_batch_size=6, num_workers=1), as_read, 0, 1)) as loader:
        positions = [loader.position]
        for _ in range(4):
            loader.read_ahead()  # counts nothing
            wait_until(is_full(loader))  # nor does what is made beyond it
            assert loader.position == positions[-1]
            next(loader)
            positions.append(loader.position)
    assert positions == [Position(0, 0), Position(0, 24), Position(0, 48), Position(1, 0), Position(1, 24)]


# ---------------------------------------------------------------------------------------------------------------------
# Random crops


def test_random_crops_are_functions_of_seed_epoch_and_id(pairs: Any) -> None:
    pair = pairs("rgb")
    settings = {"crop": "random", "mirror_prob": 0.0}
    wanted = visit(pair.config(micro_batch_size=24, **settings), 1, NUM_STEPS)
    config = pair.config(micro_batch_size=4, num_workers=1, **settings)
    assert_equal(visit(config, 2, NUM_STEPS), wanted)
    rest = visit(config, 2, 2, Position(0, 48), 2)
    assert all(
        torch.equal(latent, wanted.latents[key]) for key, latent in rest.latents.items() if key in wanted.latents
    )
    by_epoch = [{i: latent for (_, e, i), latent in wanted.latents.items() if e == epoch} for epoch in (0, 1)]

    def share_equal(found: dict[Any, Tensor], others: dict[Any, Tensor]) -> float:
        both = found.keys() & others.keys()
        assert len(both) > 20
        return sum(torch.equal(found[key], others[key]) for key in both) / len(both)

    # Crops of so small images, between pixels, are few: some are equal.
    assert share_equal(*by_epoch) < 0.2
    first, second = ({i % (1 << 56): v for i, v in by_epoch[0].items() if i >> 56 == n} for n in (0, 1))
    assert share_equal(first, second) < 0.2
    for other in ({"crop": "adm"}, {"seed": 6}):
        found = visit(pair.config(micro_batch_size=24, **settings | other), 1, NUM_STEPS).latents
        assert (
            share_equal({key[1:]: v for key, v in found.items()}, {key[1:]: v for key, v in wanted.latents.items()})
            < 0.2
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind


def is_full(loader: Loader[Any]) -> Callable[[], bool]:
    """Whether all is made that may be made ahead."""
    assert isinstance(loader._reader, EncodingReader)
    return loader._reader._made.full


def what_there_is() -> tuple[set[Any], set[Any], set[str]]:
    """Threads, child processes and shared memory."""
    threads = {thread for thread in threading.enumerate() if thread.is_alive()}
    return threads, set(multiprocessing.active_children()), shared_memory()


def close(loader: Loader[Any], before: tuple[set[Any], set[Any], set[str]]) -> None:
    loader.close()
    loader.close()
    # Threads of torch's queues end soon after.
    wait_until(lambda: all(now <= then for now, then in zip(what_there_is(), before, strict=True)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_closing_leaves_nothing_behind(pairs: Any, num_workers: int) -> None:
    """At once, between steps, and where all that may be made ahead is made."""
    config = pairs("kl").config(micro_batch_size=6, num_workers=num_workers)
    before = what_there_is()
    for num_steps in (0, 1, 3):
        loader = Loader(config, as_read, 0, 1)
        for _ in range(num_steps):
            next(loader)
        if num_steps == 3:
            wait_until(is_full(loader))
        close(loader, before)
        assert loader.position == Position(num_steps // 3, 24 * (num_steps % 3))


def test_closing_waits_for_what_is_being_made(pairs: Any) -> None:
    may_go_on, has_begun = threading.Event(), threading.Event()

    def prepare(samples: Samples, step: int) -> Samples:
        has_begun.set()
        may_go_on.wait(60)
        return samples

    before = what_there_is()
    loader = Loader(pairs("grey").config(num_workers=1), prepare, 0, 1)
    assert has_begun.wait(60)
    release = threading.Timer(0.3, may_go_on.set)
    release.start()
    loader.close()
    assert may_go_on.is_set()
    release.join()
    close(loader, before)


def test_a_request_to_stop_ends_the_wait_for_what_is_being_made(pairs: Any) -> None:
    """At once; the position is that of what was handed out."""
    may_go_on = threading.Event()

    def prepare(samples: Samples, step: int) -> Samples:
        assert step == 0 or may_go_on.wait(60)
        return samples

    before = what_there_is()
    loader = Loader(pairs("grey").config(num_workers=1), prepare, 0, 1)
    next(loader)
    stop = threading.Timer(0.3, loader.end_waiting)
    stop.start()
    loader.read_ahead()
    assert loader.problem == "data: the training process needs no more data"
    assert loader.position == Position(0, 24)
    stop.join()
    may_go_on.set()
    close(loader, before)


def test_closing_while_a_worker_hangs(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_CLOSE_SECONDS", 0.5)
    before = what_there_is()
    loader = Loader(pairs("grey").config(num_workers=1), as_read, 0, 1)
    [worker] = multiprocessing.active_children()
    next(loader)
    wait_until(is_full(loader))  # one killed while it hands a batch over may leave its shared memory
    os.kill(worker.pid or 0, signal.SIGSTOP)
    stop = threading.Timer(0.3, loader.end_waiting)
    stop.start()
    while loader.problem is None:
        loader.read_ahead()
        loader._next = None
    assert loader.problem == "data: the training process needs no more data"
    stop.join()
    close(loader, before)


def test_the_training_thread_keeps_its_number_of_threads(pairs: Any) -> None:
    """Torch's number is a thread's own, once that has computed anything."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        visit(pairs("kl").config(), 1, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_process_that_an_error_ends_waits_for_nothing(tmp_path: Path) -> None:
    folder = with_bad_images(tmp_path, {}, class_names=("a", "b", "c"))
    settings = {"shape": (3, SIZE, SIZE), "global_batch_size": 10, "micro_batch_size": 5}
    command = [sys.executable, "-c", UNCLOSED, str(folder), json.dumps(settings)]
    ended = subprocess.run(command, cwd=REPOSITORY, timeout=120, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == ""


# ---------------------------------------------------------------------------------------------------------------------
# Bad images


def with_bad_images(root: Path, bad: dict[int, bytes], **description: Any) -> Path:
    """A folder of 30 images, in shards of ten, of which those at some places are others; ids are thrice the places."""
    files = [bad.get(place, file) for place, file in enumerate(map(encoded, crops(30, SIZE)))]
    return write_images(root / "images", [files[:10], files[10:20], files[20:]], SIZE, **description)


def pixels_config(folder: Path | Sequence[Path], **settings: Any) -> Config:
    shape = settings.pop("shape", (3, SIZE, SIZE))
    config = config_for(folder, 10, 5, shape=shape, encode_batch_size=4, **settings)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=2))


BAD = {
    "text": (b"hello", r"it is no image, or one of more than [0-9,]+ pixels; make the image shards again"),
    "empty": (b"", r"it is no image, or one of more than [0-9,]+ pixels; make the image shards again"),
    "cut JPEG 2000": (
        encoded(crops(1, SIZE)[0], "JPEG2000")[:150],
        r"it is no image, or one of more than [0-9,]+ pixels; make the image shards again",
    ),
    "cut short": (
        encoded(crops(1, SIZE)[0])[:-100],
        r"DALI cannot decode it \(.*\); make the image shards again",
    ),
    "larger": (encoded(crops(1, 17)[0]), r"expected 16 x 16 pixels, got 17 x 17; make the image shards again"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_image_stops_or_is_skipped(tmp_path: Path, what: str) -> None:
    file, reason = BAD[what]
    folder = with_bad_images(tmp_path, {7: file})
    before = what_there_is()
    loader = Loader(pixels_config(folder, num_workers=1), as_read, 0, 1)
    with pytest.raises(UserError) as raised:
        take(loader)
    said = rf"data\.shards: {folder}: image of id 21: {reason}"
    assert re.fullmatch(rf"{said}; or set data\.on_bad_image=skip", str(raised.value)), raised.value
    with pytest.raises(UserError, match=r"image of id 21"):  # and again
        next(loader)
    close(loader, before)

    good = visit(pixels_config(with_bad_images(tmp_path / "good", {})), 1, 3)
    for world_size in (1, 2):
        skipped = []
        for rank in range(world_size):
            with closing(Loader(pixels_config(folder, on_bad_image="skip"), as_read, rank, world_size)) as loader:
                for step in range(3):
                    for batch in next(loader):
                        for place, i in enumerate(batch.ids_B.tolist()):
                            latent = batch.latents_BCYX[place]
                            if place in batch.skipped:
                                skipped.append((i, batch.skipped[place]))
                                assert not latent.any()
                            else:
                                assert torch.equal(latent, good.latents[step, 0, i])
        assert [i for i, _ in skipped] == [21]
        assert re.fullmatch(said, skipped[0][1])


def test_all_bad_images_of_a_micro_batch_are_named(tmp_path: Path) -> None:
    """Of both kinds, and where none is good."""
    bad = {place: BAD["cut short" if place % 2 else "larger"][0] for place in range(30) if place not in (3, 17)}
    folder = with_bad_images(tmp_path, bad)
    with closing(Loader(pixels_config(folder, on_bad_image="skip"), as_read, 0, 1)) as loader:
        found = take(loader)
    assert any(len(batch.skipped) == len(batch.ids_B) for batch in found)
    reasons = {batch.ids_B[place].item(): reason for batch in found for place, reason in batch.skipped.items()}
    assert sorted(reasons) == [3 * place for place in bad]
    for i, reason in reasons.items():
        assert f"image of id {i}: " in reason
        assert ("DALI cannot decode it" in reason) == (i // 3 % 2 == 1)


def test_a_bad_image_is_named_by_its_folder_and_id_at_each_visit(tmp_path: Path) -> None:
    folders = [with_bad_images(tmp_path / name, {8: b"hello"} if name == "b" else {}) for name in "ab"]
    config = pixels_config(folders, on_bad_image="skip", repeat=(1.0, 2.0))
    with closing(Loader(config, as_read, 0, 1)) as loader:
        found = take(loader, 9)
    skipped = {batch.ids_B[place].item(): reason for batch in found for place, reason in batch.skipped.items()}
    assert skipped.keys() == {24 + (1 << 40), 24 + (1 << 40) + (1 << 56)}
    assert all(reason.startswith(f"data.shards: {folders[1]}: image of id 24: ") for reason in skipped.values())


def test_bad_images_under_random_crops(tmp_path: Path) -> None:
    """Of the images alone, not of what else the batch holds; another size is as good for a crop."""
    folder = with_bad_images(tmp_path, {4: BAD["text"][0], 11: BAD["larger"][0], 25: BAD["cut short"][0]})
    config = pixels_config(folder, on_bad_image="skip", crop="random")
    with closing(Loader(config, as_read, 0, 1)) as loader:
        found = take(loader)
    assert sorted(batch.ids_B[place].item() for batch in found for place in batch.skipped) == [12, 75]


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_a_byte_that_flipped_is_no_bad_image(tmp_path: Path, on_bad_image: str) -> None:
    """The store is damaged, and can be restored."""
    folder = with_bad_images(tmp_path, {})
    path = folder / "shard.00001.mds"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    for num_workers in (0, 1):
        config = pixels_config(folder, on_bad_image=on_bad_image, num_workers=num_workers)
        with (
            closing(Loader(config, as_read, 0, 1)) as loader,
            pytest.raises(
                UserError, match=rf"^data\.shards: {path}: sample 9 is damaged \(its checksum differs\); copy"
            ),
        ):
            take(loader)


# ---------------------------------------------------------------------------------------------------------------------
# Faults and mistakes


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as raised:
        Loader(config, as_read, 0, 1).close()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("is_hit_at_once", [True, False])
def test_a_worker_that_is_killed(pairs: Any, is_hit_at_once: bool) -> None:
    before = what_there_is()
    loader = Loader(pairs("grey").config(num_workers=1), as_read, 0, 1)
    [victim] = multiprocessing.active_children()
    if not is_hit_at_once:
        next(loader)
    os.kill(victim.pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^data\.num_workers: a process that reads data ended by SIGKILL"):
        take(loader, 20)
    close(loader, before)


def test_latents_that_float16_cannot_hold(pairs: Any, tmp_path: Path) -> None:
    network: Any = make_network(CONFIG, "test")
    with torch.no_grad():
        network.quant_conv.weight *= 1e8
    write_folder(tmp_path / "large", network)
    pair = pairs("kl")
    loader = Loader(pair.config(autoencoder=str(tmp_path / "large"), on_bad_image="skip"), as_read, 0, 1)
    what = (
        rf"data\.shards: {pair.images[0].parent}/images[01]: image of id \d+: expected latents that float16 can hold, "
        r"got -\S*e\+\d+ to \S*e\+\d+; take another autoencoder"
    )
    with closing(loader), pytest.raises(UserError) as raised:
        next(loader)
    assert re.fullmatch(what, str(raised.value)), raised.value


def test_an_autoencoder_that_does_not_fit(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("kl")
    folder = write_autoencoder(tmp_path / "grey", in_channels=1, out_channels=1)
    said = refusal(pair.config(autoencoder=str(folder)))
    assert said.startswith(
        "data.autoencoder: expected images of 1 channels with sides that are multiples of 2, got 3 x"
    )
    deep = {"block_out_channels": [8] * 6, "down_block_types": ["DownEncoderBlock2D"] * 6}
    deep |= {"up_block_types": ["UpDecoderBlock2D"] * 6}
    folder = write_autoencoder(tmp_path / "deep", **deep)
    said = refusal(pair.config(autoencoder=str(folder)))
    assert "sides that are multiples of 32, got 3 x 16 x 16; make such images or take another autoencoder" in said
    said = refusal(pair.config(autoencoder=str(tmp_path / "nowhere")))
    assert said.startswith("data.autoencoder: expected an autoencoder's folder with config.json and ")
    said = refusal(pair.config(autoencoder=""))
    assert said.startswith("data.autoencoder: expected the folder of the one that encodes the images of ")
    assert "since model.latent_channels = 4 are not their 3, got none; set it, encode them before" in said
    said = refusal(pair.config(latent_scale=(0.2325,)))
    assert "data.latent_scale: expected [0.5, 0.25, 0.125, 0.0625], as the autoencoder says, got [0.2325]" in said
    said = refusal(pair.config(shape=(4, 16, 16)))
    assert "model.latent_size: expected 8, the rows of the latents, got 16" in said
    said = refusal(pairs("grey").config(autoencoder=pair.settings["autoencoder"]))
    assert "expected images of 3 channels with sides that are multiples of 2, got 1 x 16 x 16" in said


def test_folders_that_are_not_alike(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("rgb")

    def with_second(folder: Path, **settings: Any) -> str:
        config = pair.config(**settings)
        data = dataclasses.replace(config.data, shards=(config.data.shards[0], str(folder)))
        return refusal(dataclasses.replace(config, data=data))

    said = with_second(pair.latents[1])
    assert said.startswith("data.shards: expected shards of one kind, got images and latents in ")
    assert "encode the images, or leave one kind out" in said
    files = [list(map(encoded, crops(20, 24)))]
    larger = write_images(tmp_path / "larger", files, 24)
    assert f"data.shards: {larger}: expected latent_shape as in the first folder, (3, 16, 16)" in with_second(larger)
    originals = write_images(tmp_path / "originals", files, SIZE, store="original")
    said = with_second(originals)
    assert f"data.shards: {originals}: expected crop as in the first folder, 'adm', got 'dali'" in said
    random = pair.config(crop="random")
    data = dataclasses.replace(random.data, shards=(random.data.shards[0], str(originals)))
    visit(dataclasses.replace(random, data=data), 1, 1)  # every image is cropped by the same rule


@pytest.mark.parametrize(("encode_batch_size", "padding"), [(3, 0), (6, 0), (11, 0), (12, 6), (32, 26)])
def test_padding_that_costs_more_than_the_images_is_said(
    pairs: Any, capsys: pytest.CaptureFixture[str], encode_batch_size: int, padding: int
) -> None:
    config = pairs("grey").config(micro_batch_size=6, encode_batch_size=encode_batch_size)
    for world_size in (1, 2):
        Loader(config, as_read, 0, world_size).close()
        said = capsys.readouterr().out
        what = f"data.encode_batch_size = {encode_batch_size}: a micro-batch of 6 is padded by {padding} images"
        assert (f"WARNING: {what}, which takes as long; set 6, unless" in said) == (padding > 0)
        assert ("WARNING" in said) == (padding > 0)


def test_without_dali_it_says_what_to_install(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pairs("grey")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert 'pip install "cfpretrain[dali]"' in refusal(pair.config())
    assert visit(pair.config("latents"), 1, 1).labels  # latents need none
