"""The launch environment: which of the ranks this process is. Standard library only: read before torch is imported.

The deepspeed launcher, torchrun and the scripts of cluster/ set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
and LOCAL_SIZE or LOCAL_WORLD_SIZE.
"""

import os
from dataclasses import dataclass

from cfpretrain.base.console import UserError, exit_with, speak_as

_FIX = (
    "start with a launcher, which sets RANK, WORLD_SIZE and what goes with them (deepspeed, torchrun, a script of "
    "cluster/), or unset both for one rank"
)
# The number of tasks, of launchers that start several without setting our variables. Not SLURM_NTASKS: a job script and
# the shell of salloc have it too.
_TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "an MPI launcher",
    "PALS_SIZE": "an MPI launcher",
    "MV2_COMM_WORLD_SIZE": "an MPI launcher",
}
_LAST_PORT, _MOST_DIGITS = 65535, 18


@dataclass(frozen=True)
class Launch:
    """What the launcher said; without one, the only rank."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1  # ranks on this machine; 1 where the launcher does not say


def read() -> Launch:
    """The launch environment; UserError where a variable is missing, no number, or contradicts another."""
    world_size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0)
    if rank is None:
        if world_size not in (None, 1):
            raise _error("WORLD_SIZE", f"{world_size} ranks, but RANK is not set, so this process is none of them")
        _refuse_tasks()
        return Launch()  # the other variables are left over
    world_size = world_size or 1
    if rank >= world_size:
        raise _error(
            "RANK", f"expected less than WORLD_SIZE = {os.environ.get('WORLD_SIZE', '1 (not set)')}, got {rank}"
        )
    local_rank, local_size = _number("LOCAL_RANK", 0), _local_size()
    if local_size is not None and local_size > world_size:
        raise _error("LOCAL_SIZE", f"expected at most WORLD_SIZE = {world_size}, got {local_size}")
    if local_size is not None and local_rank is not None and local_rank >= local_size:
        raise _error("LOCAL_RANK", f"expected less than the {local_size} ranks of this machine, got {local_rank}")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
            if not os.environ.get(name):
                raise _error(name, f"expected to be set where WORLD_SIZE = {world_size}, got nothing")
        port = _number("MASTER_PORT", 1) or 0
        if port > _LAST_PORT:
            raise _error("MASTER_PORT", f"expected a port, 1 to {_LAST_PORT}, got {port}")
    return Launch(rank, world_size, local_rank or 0, local_size or 1)


def check() -> None:
    """Ends this process with one line where its environment is no launcher's; else its rank is that of `console`.

    Every command that runs on ranks calls it before it prints anything or imports torch.
    """
    try:
        speak_as(read().rank)
    except UserError as error:
        exit_with(error, speaks=True)  # on each rank, since none is known to be rank 0


def _number(name: str, least: int) -> int | None:
    """The value of a variable; None where it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.strip().isdecimal() or len(text) > _MOST_DIGITS or int(text) < least:
        raise _error(name, f"expected a whole number, at least {least}, got {text!r:.40}")
    return int(text)


def _local_size() -> int | None:
    names = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")  # the deepspeed launcher's, and torchrun's
    found = {name: size for name in names if (size := _number(name, 1)) is not None}
    if len(set(found.values())) > 1:
        raise _error(names[0], f"expected the same as LOCAL_WORLD_SIZE = {found[names[1]]}, got {found[names[0]]}")
    return next(iter(found.values()), None)


def _refuse_tasks() -> None:
    for name, launcher in _TASKS.items():
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            raise UserError(
                f"{name}: {launcher} has started {text} tasks and RANK and WORLD_SIZE are not set, so each would run "
                "alone in the same folder; start training with cluster/slurm.sbatch or cluster/hostfile.sh, or set "
                "RANK, LOCAL_RANK and WORLD_SIZE in each task as they do (RANK=0 WORLD_SIZE=1 for runs of their own)"
            )


def _error(name: str, problem: str) -> UserError:
    return UserError(f"{name} in the environment: {problem}; {_FIX}")
