"""Says what evaluation costs: sums, FID, precision and recall at scale, and two ranks against one.

    OMP_NUM_THREADS=2 python tools/measure.py evaluation scale
    python tools/measure.py evaluation ranks

scale: random features of the Inception's size. Their sums, the Frechet distance and precision and recall, each with its
seconds, the seconds a thousand images at several numbers of images, and the most memory the process has held.
ranks: images a second that one process of one thread, and two such processes, reduce to sums; the two take turns.
one-rank: the same of one process, on a GPU where there is one. `--features inception` has random weights here.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base import files, runtime
from cfpretrain.base.command_line import check_range
from cfpretrain.base.console import UserError, phase, phase_seconds
from cfpretrain.evaluation.feature_sums import Sums, add, part_of, sums_of
from cfpretrain.evaluation.features import INCEPTION, FeatureExtractor, Features, make_extractor
from cfpretrain.evaluation.frechet import frechet_distance, gaussian_of
from cfpretrain.evaluation.inception_score import splits_of
from cfpretrain.evaluation.neighbours import precision_recall
from tools.measuring import tool
from tools.measuring.common import alternate, print_rates

_BATCH = 250


def measure(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """One of three."""
    return {"scale": scale, "ranks": ranks, "one-rank": one_rank}[arguments.what](arguments)


def scale(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of random features, as large as they would be."""
    num_images, num_features = arguments.num_images, arguments.num_features
    check_range("--num-images", num_images, 2 * _BATCH)
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(num_images, num_features, generator=generator).relu_() for _ in range(2)]
    gaussians, per_thousand = [], {}
    for features_NF in sets:
        total, begin = Sums(), time.perf_counter()
        with phase("summing"):
            for first in range(0, num_images, _BATCH):
                rows_BF = features_NF[first : first + _BATCH]
                total = add(total, sums_of(Features(rows_BF), splits_of(len(rows_BF))))
                if first + _BATCH in (num_images // 10, num_images // 2, num_images):
                    per_thousand[first + _BATCH] = 1000 * (time.perf_counter() - begin) / (first + _BATCH)
        gaussians.append(gaussian_of(part_of(total, "pooled")))
    with phase("Frechet distance"):
        distance = frechet_distance(*gaussians)
    with phase("precision and recall"):
        precision, recall = precision_recall(*sets)
    found = {
        "num_images": num_images,
        "num_features": num_features,
        "sum_seconds_a_set": phase_seconds["summing"] / 2,
        "sum_seconds_a_thousand_images": per_thousand,
        "frechet_seconds": phase_seconds["Frechet distance"],
        "precision_recall_seconds": phase_seconds["precision and recall"],
        "peak_rss_mb": runtime.peak_rss_mb(),
        "frechet": distance,
        "precision": precision,
        "recall": recall,
    }
    for done, seconds in per_thousand.items():
        print(f"{'sums':28}{seconds:10.3f} s a thousand images, after {done}")
    print(f"{'sums of a set':28}{found['sum_seconds_a_set']:10.1f} s")
    print(f"{'Frechet distance':28}{found['frechet_seconds']:10.1f} s")
    print(f"{'precision and recall':28}{found['precision_recall_seconds']:10.1f} s")
    print(f"{'memory at its highest':28}{found['peak_rss_mb']:10.0f} MB")
    return found


def ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two processes against one."""
    sides = {
        "two processes": functools.partial(_rate, arguments, 2),
        "one process": functools.partial(_rate, arguments, 1),
    }
    found = print_rates(alternate(sides, arguments.pairs, "images/s", num_warm_up=0), "images/s")
    print(f"{'efficiency':28}{found['ratio'] / 2:10.2f}")
    return {"features": arguments.features, "images_per_second": found["rates"], "efficiency": found["ratio"] / 2}


def _rate(arguments: argparse.Namespace, world_size: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--batches", arguments.batches, "--batch-size", arguments.batch_size, "--features", arguments.features]
    command = tool("evaluation", "one-rank", *options)
    common = {"OMP_NUM_THREADS": 1, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(world_size):
        told = common | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in told.items()}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise UserError("a process failed; what it wrote stands above")
    return float(json.loads(said[0].splitlines()[-1])["images_per_second"])


def one_rank(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Reduces its share of random images, and all shares together, after a batch to warm up."""
    from cfpretrain.evaluation.feature_sums import Work
    from cfpretrain.evaluation.scores import statistics_of

    device = runtime.pick_device()
    with runtime.ranks_of_a_tool(device):
        if arguments.features == INCEPTION:  # with random weights: its published ones need a download
            from cfpretrain.evaluation.inception import Inception

            extractor = FeatureExtractor("fd_inception_random", "random", Inception().to(device), device, "random")
        else:
            extractor = make_extractor(arguments.features, device)
        num_images = arguments.batches * arguments.batch_size
        shape = (arguments.batch_size, 3, 256, 256)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        extractor(images)
        folder = runtime.gather(tempfile.mkdtemp() if runtime.rank() == 0 else None)[0]
        work = Work(Path(folder) / "sums", "", {}, num_images, arguments.batch_size)
        runtime.barrier()
        begin = time.perf_counter()
        share = slice(runtime.rank(), None, runtime.world_size())
        work.sum_up(lambda numbers: ((number, images) for number in numbers[share]), extractor)
        statistics_of(work)
        seconds = time.perf_counter() - begin
        runtime.barrier()
        if runtime.rank() != 0:
            return None
        work.remove()
        files.remove(Path(folder))
        return {"features": arguments.features, "images_per_second": num_images / seconds}
