"""The report of `measure.py report` as Markdown, for docs/benchmarks.md."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

GB = 1e9
Sections = Mapping[str, Mapping[str, Any]]
Rows = Sequence[Sequence[str]]


def to_markdown(sections: Sections) -> str:
    """The tables of all sections that were measured, and why the others were not.

    Args:
        sections: by name: `state`, `results` (what each command of it printed), `why`.
    """
    tables: list[Callable[[dict[str, dict[str, Any]]], Iterator[str]]] = [
        _environment,
        _tests,
        _steps,
        _starts,
        _kinds,
        _attention,
        _rates,
        _launches,
    ]
    measured = {name: of["results"][0] for name, of in sections.items() if name != "compile" and of.get("results")}
    parts = ["\n".join(lines) for table in tables if (lines := _lines(table, measured))]
    return "\n\n".join([*parts, "\n".join(_states(sections))]) + "\n"


def _lines(
    table: Callable[[dict[str, dict[str, Any]]], Iterator[str]], measured: dict[str, dict[str, Any]]
) -> list[str]:
    try:
        return list(table(measured))
    except Exception as error:  # the figures are in the JSON, and those yet to come are worth more than this table
        return [f"- table{table.__name__.replace('_', ' ')}: failed: {error!r}"]


def _table(head: Sequence[str], rows: Rows) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _number(value: float | None, form: str = ".3g", factor: float = 1.0) -> str:
    return "-" if value is None else f"{factor * value:{form}}"


def _environment(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    found = measured.get("environment")
    if found is None:
        return
    hardware, versions = found["hardware"], found["versions"]
    machine = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    parts = [f"{name} {version}" for name, version in versions.items() if version]
    yield (
        f"{machine}{hardware['cpu']}, {hardware['cores']} cores; {', '.join(parts)}. A product of large matrices: "
        f"{found['matmul_tflops']:.3g} TFLOP/s."
    )


def _tests(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, found in measured.items():
        if "summary" in found:
            yield f"{name}: {found['summary']}"
            yield from (f"- {failure}" for failure in found["failures"])


def _of_steps(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in measured.items() if "images_per_second" in found and "side" in found}


def _steps(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = []
    for name, found in _of_steps(measured).items():
        profile, train, engine = found.get("profile", {}), found["config"]["train"], found["config"]["engine"]
        rows.append(
            [
                name,
                f"{found['micro_batch_size']} x {train['global_batch_size'] // found['micro_batch_size']}",
                str(engine["zero_stage"]),
                found["blocks"]["attention"],
                _number(found["seconds_per_step"]),
                _number(found["images_per_second"], ".1f"),
                _number(found["mfu"], ".1%"),
                f"{_number(found['peak_memory_bytes'] / GB)} / {_number(found['estimated_memory_bytes'] / GB)}",
                _number(profile.get("busy_share"), ".1%"),
                _number(profile.get("num_launches"), ".0f"),
                _number(profile.get("num_synchronisations"), ".0f"),
            ]
        )
    if rows:
        head = ["step", "micro-batch", "ZeRO", "attention", "s", "images/s", "MFU", "GB measured / estimated"]
        yield from _table([*head, "GPU busy", "launches", "syncs"], rows)


def _starts(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    starts = {
        # A stage is another row's; names of folders differ from run to run.
        name: {phase.split(", ")[0]: s for phase, s in found["start_seconds"].items() if "/" not in phase}
        for name, found in _of_steps(measured).items()
    }
    phases = list(dict.fromkeys(phase for start in starts.values() for phase in start))
    rows = [[phase, *(_number(start.get(phase), ".1f") for start in starts.values())] for phase in phases]
    if rows:
        yield from _table(["seconds of the start", *starts], rows)


def _kinds(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    shares = {name: found["profile"]["shares"] for name, found in measured.items() if "profile" in found}
    kinds = list(dict.fromkeys(kind for of in shares.values() for kind in of))
    rows = [[kind, *(_number(of.get(kind), ".1%") for of in shares.values())] for kind in kinds]
    if rows:
        yield from _table(["share of the busy time", *shares], rows)


def _attention(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    found = measured.get("attention", {})
    rows = [
        [
            f"{row['length']} / {row['head_width']}",
            str(row["batch_size"]),
            row["backend"],
            f"{row['visible_share']:.2f}",
            *(_number(1e3 * row[kind], ".3f") for kind in ("forward", "kernels", "both")),
            *(_number(row[f"{kind}_tflops"]) for kind in ("forward", "kernels", "both")),
            f"{row['error']:.1e}",
        ]
        for row in found.get("attention", [])
    ]
    if rows:
        times = [f"{kind} {unit}" for unit in ("ms", "TFLOP/s") for kind in ("forward", "kernels", "both")]
        yield from _table(["tokens / head", "batch", "backend", "visible", *times, "error"], rows)
        yield ""
    yield from (f"- {name}: not measured: {why}" for name, why in found.get("not_measured", {}).items())


def _rates(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = []
    for name, found in measured.items():
        for row in found.get("rows", []):
            what = f"{name}, {row['num_ar_steps']} AR steps x {found['num_denoising_steps']}, {found['precision']}"
            rows.append([f"{what}, {found['cached_attention']}", f"{row['cached_images_per_second']:.3g} images/s"])
        if "rates" in found:
            rows += [[f"{name}, {side}", f"{max(rates):.4g} {found['unit']}"] for side, rates in found["rates"].items()]
        for side, spent in found.get("spent", {}).items():
            what = f"{name} of {found['batch_size']}, {side}: the training thread"
            rows.append([what, f"{min(spent):.2f} {found['unit']} a micro-batch"])
        if "features" in found:
            rows.append([f"{name}, {found['features']}", f"{found['images_per_second']:.4g} images/s"])
        if "stall_seconds" in found:
            rows.append([f"{name}: a save keeps the step waiting", f"{_number(found['stall_seconds'], '.2f')} s"])
            rows += [[f"{name}: {kind} adds", f"{share:+.1%}"] for kind, share in found["added"].items()]
    if rows:
        yield from _table(["what", "measured"], rows)


def _launches(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = [
        [one["kernel"], str(one["head_width"]), f"Launch{tuple(one['launch'])}", f"{one['of_best']:.2f}"]
        for one in measured.get("sweep", {}).get("best", [])
    ]
    if rows:
        yield from _table(["kernel", "head", "for LAUNCHES", "of the best at each length"], rows)


def _states(sections: Sections) -> Iterator[str]:
    for name, of in sections.items():
        if of["state"] != "measured":
            yield f"- {name}: {of['state']}: {of['why']}"
    spent = ", ".join(f"{name} {of['seconds']:.0f} s" for name, of in sections.items() if "seconds" in of)
    yield f"- spent: {spent}"
