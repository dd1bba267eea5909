"""Results of a study: means, noise, differences, verdicts on expected figures, a table and a plot."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from unmask.checks.studies.measures import CURVES, MEASURES
from unmask.checks.studies.settings import ExpectedConfig, PlotConfig, Study
from unmask.core.files import write_text

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]  # by variant, in the order of the seeds
Verdict = Literal["holds", "fails", "within noise", "not judged"]

NOISE_FACTOR: Final = 2  # a difference counts from twice its standard deviation over the seeds
_AXES: Final = {"tokens": "tokens", "predicted": "predicted tokens", "training_seconds": "training seconds"}


def by_variant(study: Study, runs: Sequence[Run]) -> Runs:
    """Return the runs of each variant in the order of the seeds, without variants that have none."""
    names = [variant.name for variant in study.config.variant]
    grouped = {
        name: sorted((run for run in runs if run["variant"] == name), key=lambda run: run["seed"]) for name in names
    }
    return {name: group for name, group in grouped.items() if group}


def summarize(runs: Runs, measures: Sequence[str]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return, for each measure and variant that has it, its mean and range, and its difference to the first variant.

    `noise` is the standard deviation of the differences over the seeds; None with one seed.
    """
    reference = next(iter(runs), "")
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for measure in measures:
        summary[measure] = {}
        for name, group in runs.items():
            values = [run["measures"][measure] for run in group]
            if None in values:
                continue
            differences = compared(runs, measure, name, reference)
            summary[measure][name] = {
                "mean": statistics.fmean(values),
                "lowest": min(values),
                "highest": max(values),
                "difference": statistics.fmean(differences) if differences else None,
                "noise": statistics.stdev(differences) if len(differences) > 1 else None,
            }
    return summary


def compared(runs: Runs, measure: str, variant: str, against: str, kind: str = "difference") -> list[float]:
    """Return the difference or ratio of a measure of two variants for each seed that both have."""
    other = {run["seed"]: run["measures"][measure] for run in runs.get(against, ())}
    pairs = [(run["measures"][measure], other.get(run["seed"])) for run in runs.get(variant, ())]
    known = [(one, two) for one, two in pairs if one is not None and two is not None]
    if kind == "ratio":
        return [one / two for one, two in known if two]
    return [one - two for one, two in known]


def judge(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """Return each expected figure with the measured mean, its noise, and whether it holds."""
    return [_judged(expected, runs, study) for expected in study.config.expected]


def _judged(expected: ExpectedConfig, runs: Runs, study: Study) -> dict[str, Any]:
    values = compared(runs, expected.measure, expected.variant, expected.against, expected.kind)
    mean = statistics.fmean(values) if values else None
    noise = statistics.stdev(values) if len(values) > 1 else None
    verdict: Verdict = "not judged"  # of a quick study, or without noise
    if mean is not None and noise is not None and not study.quick:
        outside, doubt = max(expected.at_least - mean, mean - expected.at_most), NOISE_FACTOR * noise
        # A direction holds beyond the noise only; a figure holds within its tolerance.
        is_direction = math.isinf(expected.at_least) or math.isinf(expected.at_most)
        holds = outside <= (-doubt if is_direction else 0)
        verdict = "holds" if holds else "within noise" if outside <= doubt else "fails"
    facts = {name: getattr(expected, name) for name in ("measure", "variant", "against", "kind", "basis", "bounds")}
    return {**facts, "mean": mean, "noise": noise, "verdict": verdict}


# Table ----------------------------------------------------------------------------------------------------------------


def table(study: Study, result: Mapping[str, Any]) -> str:
    """Return the results as Markdown: one table per measure, and the expected figures."""
    text, machine = result["text"], result["machine"]
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        f"# {study.name}",
        "",
        study.config.question,
        "",
        f"Source: {study.config.source}. Text: {text['name']}, {text['characters']:,} characters. Recipe: "
        f"{study.config.recipe}. Budget: {result['budget']}{_clock(study)}. Seeds: {seeds}. "
        f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, unmask "
        f"{result['versions']['unmask']}, torch {result['versions']['torch']}, {result['date']}.",
        "",
        f"Noise: standard deviation of the difference over the seeds. Variants differ beyond {NOISE_FACTOR} × noise.",
    ]
    if study.quick:
        lines += ["", "**A quick run: it shows that the study works, and no more.**"]
    for measure, rows in result["summary"].items():
        lines += ["", f"## {measure}", "", f"{MEASURES[measure].about[0].upper()}{MEASURES[measure].about[1:]}.", ""]
        header, *cells = measure_cells(measure, rows, list(result["variants"]))
        lines += [f"| {' | '.join(header)} |", "| --- | ---: | ---: | ---: | ---: | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    if result["expected"]:
        lines += ["", "## Expected figures", ""]
        lines += ["| figure | expected | measured | | basis |", "| --- | --- | ---: | --- | --- |"]
        lines += [f"| {' | '.join(cells)} |" for cells in expected_cells(result["expected"])]
    return "\n".join(lines) + "\n"


def _clock(study: Study) -> str:
    return " of processor time" if study.budget.unit == "seconds" else ""


def measure_cells(
    measure: str, rows: Mapping[str, Mapping[str, float | None]], variants: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return header and rows of a measure: variant, mean, range, difference to the first one, twice its noise, note."""
    decimals, reference = MEASURES[measure].decimals, variants[0]
    cells = [("variant", "mean", "from – to", f"against {reference}", f"{NOISE_FACTOR} × noise", "")]
    for name in variants:
        if (row := rows.get(name)) is None:
            cells.append((name, "–", "", "", "", ""))
            continue
        difference, noise, shown, spread, note = row["difference"], row["noise"], "", "", ""
        if difference is not None and name != reference:
            shown = f"{difference:+.{decimals}f}"
            spread = "one seed" if noise is None else f"{NOISE_FACTOR * noise:.{decimals}f}"
            note = "differs" if noise is not None and abs(difference) > NOISE_FACTOR * noise else ""
        span = f"{row['lowest']:.{decimals}f} – {row['highest']:.{decimals}f}"
        cells.append((name, f"{row['mean']:.{decimals}f}", span, shown, spread, note))
    return cells


def expected_cells(expected: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Return a row per expected figure: figure, bounds, measured mean with twice its noise, verdict, basis."""
    rows: list[tuple[str, str, str, str, str]] = []
    for figure in expected:
        sign = "÷" if figure["kind"] == "ratio" else "−"
        measured = "" if figure["mean"] is None else f"{figure['mean']:.4f}"
        if figure["noise"] is not None:
            measured += f" ± {NOISE_FACTOR * figure['noise']:.4f}"
        name = f"{figure['measure']}: {figure['variant']} {sign} {figure['against']}"
        rows.append((name, figure["bounds"], measured, figure["verdict"], figure["basis"]))
    return rows


# Plot -----------------------------------------------------------------------------------------------------------------


def write_plot(path: Path, runs: Runs, config: PlotConfig) -> bool:
    """Write the mean curve of each variant, with its range over the seeds, as SVG.

    Returns:
        Whether it was written: matplotlib is installed, and a variant has the figure.
    """
    shown = {name: group for name, group in runs.items() if name in (config.variants or runs)}
    drawn = {name: curve for name, group in shown.items() if (curve := _mean_curve(group, config))}
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return False
    matplotlib, figures = map(importlib.import_module, ("matplotlib", "matplotlib.figure"))
    with matplotlib.rc_context({"svg.hashsalt": "unmask", "svg.fonttype": "none"}):  # equal results give equal files
        figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, (x, mean, low, high) in drawn.items():
            line = axes.plot(x, mean, label=name, linewidth=1.5)[0]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if config.y == "loss":
            unigram = next(iter(runs.values()))[0]["curve"][-1]["unigram_loss"]
            axes.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram")
        axes.set_xlabel(_AXES[config.x])
        axes.set_ylabel(CURVES[config.y])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_text(path, buffer.getvalue())
    return True


Curve = tuple[list[float], list[float], list[float], list[float]]  # x, mean, lowest, highest


def _mean_curve(group: Sequence[Run], config: PlotConfig) -> Curve | None:
    """Return the curve of a variant over its seeds; None if a point lacks the figure."""
    points = list(zip(*(run["curve"] for run in group), strict=False))
    values = [[point.get(config.y) for point in each] for each in points]
    if not values or any(value is None for each in values for value in each):
        return None
    x = [statistics.fmean(point[config.x] for point in each) for each in points]
    return (
        x,
        [statistics.fmean(each) for each in values],
        [min(each) for each in values],
        [max(each) for each in values],
    )
