"""A sample that one rank alone reads is damaged: all ranks end with one line that names the file and the fix."""

from pathlib import Path

from tests.digits import digits, digits_info, small_run, write_latents
from tests.processes import run_script


def test_a_run_over_a_damaged_sample(tmp_path: Path) -> None:
    folder = write_latents(tmp_path / "digits", digits_info(100), digits(100), samples_per_shard=10)
    path = folder / "shard.00003.mds"
    flipped = bytearray(path.read_bytes())
    flipped[-40] ^= 1  # of the last sample's mean
    path.write_bytes(flipped)
    arguments = small_run(folder, tmp_path / "run", "data.num_workers=1", "checkpoint.every_steps=1")
    ended = run_script("cfpretrain/train.py", arguments, world_size=2)
    assert [rank.code for rank in ended] == [2, 2]
    lines = [line for rank in ended for line in rank.err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1, lines
    assert lines[0].startswith(
        f"[cfpretrain] error: data.shards: {path}: sample 9 is damaged (its checksum differs); copy"
    )
    assert not any("Traceback" in rank.err for rank in ended)
    assert not (tmp_path / "run" / "requeue").exists()
