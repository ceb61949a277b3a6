"""The report of `measure.py report` as Markdown, for docs/benchmarks.md."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, dict[str, Any]]  # what the first command of each section printed


def to_markdown(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of all sections that were measured, and why the others were not.

    Args:
        sections: by name: `state`, `results` (what each command of it printed), `why`.
    """
    measured = {name: of["results"][0] for name, of in sections.items() if name != "compile" and of.get("results")}
    parts = []
    for table in (_environment, _tests, _steps, _starts, _kinds, _attention, _rates, _launches):
        try:
            parts.append(table(measured))
        except Exception as error:  # the figures are in the JSON, and those yet to come are worth more than this table
            parts.append([f"- table{table.__name__.replace('_', ' ')}: failed: {error!r}"])
    states = [f"- {name}: {of['state']}: {of['why']}" for name, of in sections.items() if of["state"] != "measured"]
    spent = ", ".join(f"{name} {of['seconds']:.0f} s" for name, of in sections.items() if "seconds" in of)
    parts.append([*states, f"- spent: {spent}"])
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; none where it has no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return lines and [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else f"{value:{form}}"


def _environment(measured: Results) -> list[str]:
    found = measured.get("environment")
    if found is None:
        return []
    hardware, versions = found["hardware"], found["versions"]
    machine = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    parts = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return [
        f"{machine}{hardware['cpu']}, {hardware['cores']} cores; {parts}. A product of large matrices: "
        f"{found['matmul_tflops']:.3g} TFLOP/s."
    ]


def _tests(measured: Results) -> list[str]:
    summaries = {name: found for name, found in measured.items() if "summary" in found}
    lines = [[f"{name}: {found['summary']}", *found["failures"]] for name, found in summaries.items()]
    return [line for summary, *failures in lines for line in (summary, *(f"- {failure}" for failure in failures))]


def _of_steps(measured: Results) -> Results:
    return {name: found for name, found in measured.items() if "images_per_second" in found and "side" in found}


def _steps(measured: Results) -> list[str]:
    head = ["step", "micro-batch", "ZeRO", "attention", "s", "images/s", "MFU", "GB measured / estimated"]
    rows = []
    for name, found in _of_steps(measured).items():
        profile, train, engine = found.get("profile", {}), found["config"]["train"], found["config"]["engine"]
        row = [
            name,
            f"{found['micro_batch_size']} x {train['global_batch_size'] // found['micro_batch_size']}",
            str(engine["zero_stage"]),
            found["blocks"]["attention"],
            _number(found["seconds_per_step"]),
            _number(found["images_per_second"], ".1f"),
            _number(found["mfu"], ".1%"),
            f"{found['peak_memory_bytes'] / 1e9:.3g} / {found['estimated_memory_bytes'] / 1e9:.3g}",
            _number(profile.get("busy_share"), ".1%"),
            _number(profile.get("num_launches"), ".0f"),
            _number(profile.get("num_synchronisations"), ".0f"),
        ]
        rows.append(row)
    return _table([*head, "GPU busy", "launches", "syncs"], rows)


def _compared(title: str, columns: Results, form: str) -> list[str]:
    """A table with a column for each section and a row for each name that one of them has."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return _table(
        [title, *columns], ([name, *(_number(of.get(name), form) for of in columns.values())] for name in names)
    )


def _starts(measured: Results) -> list[str]:
    starts = {
        # A stage is another row's; names of folders differ from run to run.
        name: {phase.split(", ")[0]: s for phase, s in found["start_seconds"].items() if "/" not in phase}
        for name, found in _of_steps(measured).items()
    }
    return _compared("seconds of the start", starts, ".1f")


def _kinds(measured: Results) -> list[str]:
    shares = {name: found["profile"]["shares"] for name, found in measured.items() if "profile" in found}
    return _compared("share of the busy time", shares, ".1%")


def _attention(measured: Results) -> list[str]:
    found, kinds = measured.get("attention", {}), ("forward", "kernels", "both")
    rows = [
        [
            f"{row['length']} / {row['head_width']}",
            str(row["batch_size"]),
            row["backend"],
            f"{row['visible_share']:.2f}",
            *(_number(1e3 * row[kind], ".3f") for kind in kinds),
            *(_number(row[f"{kind}_tflops"]) for kind in kinds),
            f"{row['error']:.1e}",
        ]
        for row in found.get("attention", [])
    ]
    times = [f"{kind} {unit}" for unit in ("ms", "TFLOP/s") for kind in kinds]
    table = _table(["tokens / head", "batch", "backend", "visible", *times, "error"], rows)
    missing = [f"- {name}: not measured: {why}" for name, why in found.get("not_measured", {}).items()]
    return [*table, *([""] if table and missing else []), *missing]


def _rates(measured: Results) -> list[str]:
    rows = []
    for name, found in measured.items():
        for row in found.get("rows", []):
            what = f"{name}, {row['num_ar_steps']} AR steps x {found['num_denoising_steps']}, {found['precision']}"
            rows.append([f"{what}, {found['cached_attention']}", f"{row['cached_images_per_second']:.3g} images/s"])
        if "spent" in found:
            of_thread = f"{name} of {found['batch_size']}, {{}}: the training thread"
            rows += [
                [of_thread.format(side), f"{min(spent):.2f} ms a micro-batch"] for side, spent in found["spent"].items()
            ]
        if "rates" in found:
            rows += [[f"{name}, {side}", f"{max(rates):.4g} {found['unit']}"] for side, rates in found["rates"].items()]
        if "encoding_flops" in found:
            row = f"{name}, encoding in {found['precision']}, {found['batch_size']} at once"
            rows.append([row, f"{found['encoding_flops']:.3e} FLOPs an image"])
        if found.get("encoding"):
            rate = found["encoding"]["tflop_per_second"]
            rows.append([f"{name}: the autoencoder beside the model", f"{rate:.3g} TFLOP/s"])
        if "features" in found:
            rows.append([f"{name}, {found['features']}", f"{found['images_per_second']:.4g} images/s"])
        if "stall_seconds" in found:
            rows.append([f"{name}: a save keeps the step waiting", f"{_number(found['stall_seconds'], '.2f')} s"])
            rows += [[f"{name}: {kind} adds", f"{share:+.1%}"] for kind, share in found["added"].items()]
    return _table(["what", "measured"], rows)


def _launches(measured: Results) -> list[str]:
    rows = [
        [one["kernel"], str(one["head_width"]), f"Launch{tuple(one['launch'])}", f"{one['of_best']:.2f}"]
        for one in measured.get("sweep", {}).get("best", [])
    ]
    return _table(["kernel", "head", "for LAUNCHES", "of the best at each length"], rows)
