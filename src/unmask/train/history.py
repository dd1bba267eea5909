"""Room card: what became of the runs in a folder.

Comes in: a folder of runs. Goes out: a Past for each (state, steps, tokens, the last and the best validation, time),
and the settings in which they differ. Called by: `unmask runs`, duties (which lays settings flat for a dashboard).

Only recipe.toml, env.json, log.jsonl and lock.json are read. A run that is damaged is told with its problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from unmask import store
from unmask.errors import RunError, UnmaskError
from unmask.recipe import load_toml
from unmask.train.lock import holder, is_gone
from unmask.train.track import CRASH, LOG, read_log

State = Literal["running", "finished", "ended early", "stopped", "crashed", "killed", "damaged"]
_OURS = ("recipe.toml", "env.json", LOG)
_MACHINE = ("device", "precision", "threads", "ranks")
_NOT_COMPARED = ("about", "show", "name", "plan")  # the name stands in a column of its own


@dataclass(frozen=True)
class Past:
    """What became of one run; None where its files don't say."""

    run: Path
    state: State
    problem: str = ""  # of a damaged one
    recipe: str = ""
    text: str = ""
    tokenizer: str = ""  # the first letters of its fingerprint
    tokenizer_kind: str = ""
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    loss: float | None = None  # of the last validation, like the next two
    accuracy: float | None = None
    bits_per_character: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    worked_on: float = 0.0  # when its log was last written, in seconds of the system's clock
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # dotted key -> value


def runs_in(folder: Path) -> list[Past]:
    """The runs in a folder, or the one that it is, newest first.

    Raises:
        RunError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunError("there is no such folder", where=str(folder), next="name the folder that your runs are in")
    places = [folder] if _is_run(folder) else [one for one in folder.iterdir() if one.is_dir() and _is_run(one)]
    found = [look(place) for place in places if not place.name.startswith(".") or place == folder]
    return sorted(found, key=lambda past: (-past.worked_on, past.run.name))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _OURS)


def look(run: Path) -> Past:
    """What became of a run; whatever is wrong with its files is told in it."""
    log = run / LOG
    worked_on = (log if log.is_file() else run).stat().st_mtime
    try:
        return _read(run, worked_on)
    except UnmaskError as error:
        return Past(run, "damaged", problem=f"{error.what} ({error.where})", worked_on=worked_on)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # of another shape
        return Past(run, "damaged", problem=f"{type(error).__name__}: {error}", worked_on=worked_on)


def _read(run: Path, worked_on: float) -> Past:
    tree = load_toml(run / "recipe.toml")
    plan: Mapping[str, Any] = tree.get("plan", {})
    environment: Mapping[str, Any] = store.read_json(run / "env.json")
    lines = list(read_log(run / LOG))
    last: Mapping[str, Any] = lines[-1] if lines else {}
    validations = [line for line in lines if "validation" in line]
    losses = [(_number(line["validation"].get("loss")), int(line["step"])) for line in validations]
    judged = [(loss, step) for loss, step in losses if loss is not None]
    held: Mapping[str, Any] = validations[-1]["validation"] if validations else {}
    steps = sum(int(stage["steps"]) for stage in plan["stages"]) if plan else None
    step = int(last.get("step", 0))
    text: Mapping[str, Any] = environment["text"]
    names = ", ".join(Path(path).name for path in text["paths"]) or "in memory"
    machine = {f"machine.{name}": environment["bits"].get(name) for name in _MACHINE}
    settings = {key: value for key, value in flattened(tree).items() if key.split(".")[0] not in _NOT_COMPARED}
    return Past(
        run=run,
        state=_state(run, last, step, steps),
        recipe=str(tree.get("name", "")),
        text=names,
        tokenizer=str(text["tokenizer"])[:8],
        tokenizer_kind=str(settings.get("text.tokenizer.kind", "")),
        step=step,
        steps=steps,
        tokens=next((int(line["tokens"]) for line in reversed(lines) if "tokens" in line), None),
        seconds=next((_number(line["seconds"]) for line in reversed(lines) if "seconds" in line), None),
        loss=_number(held.get("loss")),
        accuracy=_number(held.get("accuracy")),
        bits_per_character=_number(held.get("bits_per_character")),
        best_loss=min(judged)[0] if judged else None,
        best_step=min(judged)[1] if judged else None,
        worked_on=worked_on,
        settings={"text": names, **settings, **machine},
    )


def _state(run: Path, last: Mapping[str, Any], step: int, steps: int | None) -> State:
    held = holder(run)
    if held is not None and not is_gone(held):
        return "running"  # or on another host, of which nothing else can be known
    if (run / CRASH).is_file():
        return "crashed"
    if "ended_early" in last:
        return "ended early"
    if held is not None:
        return "killed"
    return "finished" if steps is not None and step >= steps else "stopped"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def flattened(tree: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys; entries of a list of tables are numbered from 0."""
    return dict(_flat(tree, under))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, entry in cast("Mapping[str, Any]", value).items():
            yield from _flat(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in cast("list[Any]", value)):
        for number, entry in enumerate(cast("list[Any]", value)):
            yield from _flat(entry, f"{key}.{number}")
    else:
        yield key, value


def differing(pasts: Sequence[Past]) -> list[str]:
    """The settings in which whole runs differ, in the recipe's order; a run that lacks one differs by that."""
    whole = [past.settings for past in pasts if past.settings]
    keys = dict.fromkeys(key for settings in whole for key in settings)
    return [key for key in keys if any(settings.get(key) != whole[0].get(key) for settings in whole)]
