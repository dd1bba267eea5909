"""Writes the page: HTML with all numbers and texts, and data for page.js, which draws the charts and translates it."""

from __future__ import annotations

import datetime
import html
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any, Final

from unmask.core.config import dump_config
from unmask.core.format import count, duration, join_names, visible
from unmask.core.version import __version__
from unmask.report import charts
from unmask.report.collect import Row, RunReport
from unmask.training.runs import differing_settings

_MAX_SETTINGS: Final = 40  # rows of the table of differing settings
_MAX_PARADIGMS: Final = 200
_MAX_TEXT: Final = 60_000  # characters of a recipe
_MAX_COMMAND: Final = 1_000
_AXES: Final = ("step", "seconds", "tokens", "flops")
_TIME_UNITS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0}
_LONGEST_IN: Final = {"s": 300.0, "min": 3 * 3600.0}  # seconds that are shown in a unit
_GROUPS: Final = ("by_frequency", "by_place_in_word", "by_position", "by_characters", "by_input")


def render(reports: Sequence[RunReport]) -> str:
    """Return the page as HTML; it reads nothing from a network.

    Raises:
        ModuleNotFoundError: vl-convert-python is not installed.
    """
    several = len(reports) > 1
    name = f"{len(reports)} runs" if several else reports[0].name
    content = _Content(reports)
    body = "\n".join([_header(reports), "<main>", *content.sections(), "</main>"])
    data = {
        "words": words(),
        "unit": content.unit,
        "tables": content.tables,
        "charts": content.charts,
        "sentences": content.sentences,
    }
    page = Template(_resource("page.html")).substitute(
        title=html.escape(f"{name} · unmask"),
        style=_resource("page.css"),
        body=body,
        data=_script_json(data),
        vega=charts.script().replace("</script", "<\\/script").replace("<!--", "<\\!--"),
        script=_resource("page.js"),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a path that is not UTF-8 has lone surrogates


def _script_json(value: Any) -> str:
    """Return JSON that can't end the script element that contains it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _resource(name: str) -> str:
    return resources.files("unmask.report").joinpath(name).read_text(encoding="utf-8")


@cache
def words() -> Mapping[str, Sequence[str]]:
    """Return the words of the page by key, in English and Korean; {0} stands for the first value."""
    return json.loads(_resource("words.json"))


# HTML -----------------------------------------------------------------------------------------------------------------


def _word(key: str, *values: object, tag: str = "span") -> str:
    """Return an element with a word in English, which page.js translates."""
    texts = [str(value) for value in values]
    attribute = f" data-a='{html.escape(json.dumps(texts, ensure_ascii=False))}'" if texts else ""
    return f'<{tag} data-t="{html.escape(key)}"{attribute}>{html.escape(words()[key][0].format(*texts))}</{tag}>'


def _text(value: object) -> str:
    return html.escape(visible(str(value)))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """Return a table of HTML cells; columns from `numbers_from` on are aligned to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        tags = [f'{tag} class="n"' if number >= numbers_from else tag for number in range(len(cells))]
        return f"<tr>{''.join(f'<{name}>{cell}</{tag}>' for name, cell in zip(tags, cells, strict=True))}</tr>"

    head = f"<thead>{line('th', header)}</thead>" if any(header) else ""
    body = "".join(line("td", cells) for cells in rows)
    return f'<div class="table" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def _details(title: str, inner: str) -> str:
    return f"<details><summary>{title}</summary>{inner}</details>"


def _section(identifier: str, title: str, *inner: str) -> str:
    return f'<section aria-labelledby="{identifier}"><h2 id="{identifier}">{title}</h2>{"".join(inner)}</section>'


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _cut(text: str, limit: int) -> str:
    """Return an escaped text; of a long one, the beginning and the number of the other characters."""
    more = len(text) - limit
    return html.escape(text[:limit]) + (f" … ({_word('cut', f'{more:,}')})" if more > 0 else "")


def _header(reports: Sequence[RunReport]) -> str:
    several = len(reports) > 1
    title = _word("title_runs", len(reports)) if several else _text(reports[0].name)
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    themes = "".join(
        f'<option value="{value}" data-t="theme_{name}">{words()[f"theme_{name}"][0]}</option>'
        for name, value in (("auto", ""), ("light", "light"), ("dark", "dark"))
    )
    return (
        f'<header class="page"><div><h1>{title}</h1><p class="muted">{_word("generated", __version__, now)}</p></div>'
        f'<div class="controls"><label>{_word("language")} <select id="language">'
        '<option value="en" lang="en">English</option><option value="ko" lang="ko">한국어</option></select></label>'
        f'<label>{_word("theme")} <select id="theme" autocomplete="off">{themes}</select></label></div></header>'
    )


# Sections -------------------------------------------------------------------------------------------------------------


class _Content:
    """Builds the sections, and collects the data of their charts."""

    def __init__(self, reports: Sequence[RunReport]) -> None:
        self._reports, self._several = reports, len(reports) > 1
        tokenizers = list(dict.fromkeys(report.summary.tokenizer for report in reports))
        self._groups = [[each for each in reports if each.summary.tokenizer == name] for name in tokenizers]
        self.tables: dict[str, list[Row]] = {"training": [], "validation": [], "borders": [], "unigram": []}
        self.charts: dict[str, charts.Spec] = {}
        self.sentences: list[Mapping[str, Any]] = []
        longest = max(row["seconds"] for each in reports for row in (*each.training, *each.validations, {"seconds": 0}))
        self.unit = next((unit for unit, most in _LONGEST_IN.items() if longest <= most), "h")
        for group, members in enumerate(self._groups):
            for report in members:
                self._add_rows(group, report)

    def _add_rows(self, group: int, report: RunReport) -> None:
        common = {"run": report.name, "group": group}
        for name, rows in (
            ("training", report.training), ("validation", report.validations), ("borders", report.borders),
        ):  # fmt: skip
            self.tables[name] += [self._in_unit(row) | common for row in rows]
        unigram = [row["unigram_loss"] for row in report.validations[-1:]]
        known = [row["loss"] for row in self.tables["unigram"] if row["group"] == group]
        self.tables["unigram"] += [{"loss": loss, **common} for loss in unigram if loss not in known]

    def _in_unit(self, row: Row) -> Row:
        return row | {"seconds": float(f"{row['seconds'] / _TIME_UNITS[self.unit]:.5g}")}

    def sections(self) -> list[str]:
        """Return the sections of the page in their order."""
        if not self._several:
            report = self._reports[0]
            return [_state(report), _cards(report), self._curves(), *self._run_sections(0, report)]
        runs = [
            f'<details class="run" id="run-{number}"{" open" if number == 0 else ""}><summary>{_text(report.name)}'
            f"</summary>{_state(report)}{_cards(report)}{''.join(self._run_sections(number, report))}</details>"
            for number, report in enumerate(self._reports)
        ]
        return [self._runs_table(), self._differing(), self._curves(), *runs]

    def _run_sections(self, number: int, report: RunReport) -> list[str]:
        return [
            self._sentences(number, report),
            self._predictions(number, report),
            self._pairs(number, report),
            _finetuning(number, report),
            _text_section(number, report),
            _plan(number, report),
            _repeat(number, report),
        ]

    # Several runs ---------------------------------------------------------------------------------------------------

    def _runs_table(self) -> str:
        names = ("run", "state", "validation_loss", "unigram_column", "accuracy", "bits_per_character", "steps", "time")
        parts: list[str] = []
        for members in self._groups:
            first = members[0].summary
            if len(self._groups) > 1:
                parts.append(f"<h3>{_word('tokenizer_group', first.tokenizer, first.tokenizer_kind)}</h3>")
            parts.append(_table([_word(name) for name in names], map(self._runs_row, members), numbers_from=2))
        if len(self._groups) > 1:
            parts.insert(0, f"<p>{_word('tokenizers_differ', len(self._groups))}</p>")
        return _section("runs", _word("runs"), *parts)

    def _runs_row(self, report: RunReport) -> list[str]:
        summary, last = report.summary, report.last_validation
        name = f'<a href="#run-{self._reports.index(report)}">{_text(report.name)}</a>'
        return [
            name, _word(f"state_name_{summary.state}"), _number(summary.loss), _number(last.get("unigram_loss")),
            _number(summary.accuracy, ".1%"), _number(summary.bits_per_character),
            f"{summary.step:,} / {summary.steps:,}", "–" if summary.seconds is None else duration(summary.seconds),
        ]  # fmt: skip

    def _differing(self) -> str:
        keys = differing_settings([report.summary for report in self._reports])
        if not keys:
            return _section("differing", _word("settings_differ"), f"<p>{_word('no_difference')}</p>")
        rows = [
            [f"<code>{_text(key)}</code>", *(_cut(visible(str(each.summary.settings.get(key, "–"))), 120)
                                            for each in self._reports)]
            for key in keys[:_MAX_SETTINGS]
        ]  # fmt: skip
        header = [_word("setting"), *(_text(report.name) for report in self._reports)]
        more = len(keys) - _MAX_SETTINGS
        note = f'<p class="muted">{_word("more_settings", more)}</p>' if more > 0 else ""
        return _section("differing", _word("settings_differ"), _table(header, rows, len(header)), note)

    # Curves ---------------------------------------------------------------------------------------------------------

    def _chart(self, name: str, spec: charts.Spec, label: str, caption: str = "") -> str:
        """Return the element of a chart. `label` describes it to screen readers: an English text."""
        self.charts[name] = spec
        below = f"<figcaption>{caption}</figcaption>" if caption else ""
        chart = f'<div class="chart" data-chart="{name}" role="img" aria-label="{_text(label)}"></div>'
        return f"<figure>{chart}{below}</figure>"

    def _curves(self) -> str:
        several = self._several
        choices = "".join(
            f'<label><input type="radio" name="axis" value="{axis}"{" checked" if axis == "step" else ""}> '
            f"{_word(f'axis_{axis}')}</label>"
            for axis in _AXES
        )
        small: list[str] = []
        parts = [f"<fieldset><legend>{_word('x_axis')}</legend>{choices}</fieldset>"]
        for group, members in enumerate(self._groups):
            if len(self._groups) > 1:
                first = members[0].summary
                parts.append(f"<h3>{_word('tokenizer_group', first.tokenizer, first.tokenizer_kind)}</h3>")
            label = "; ".join(f"{each.name}: {_loss_text(each)}" for each in members)
            caption = _word("loss_note") + (f" {_word('loss_note_runs')}" if several else "")
            chart = charts.loss_chart(self._overlay(group))
            parts.append(self._chart(f"loss-{group}", chart, label, "" if group else caption))
            small = [
                self._line(f"{field}-{group}", "validation", field, form, group)
                for field, form in (("accuracy", ".0%"), ("bits_per_character", ".2f"))
            ]
            if len(self._groups) > 1:
                parts.append(f'<div class="grid">{"".join(small)}</div>')
                small = []
        training = (("tokens_per_second", "~s"), ("learning_rate", "~g"), ("grad_norm", ".2~f"))
        small += [self._line(field, "training", field, form, None) for field, form in training]
        if not self.tables["training"]:
            parts.append(f"<p>{_word('no_training_lines')}</p>")
        parts.append(f'<div class="grid">{"".join(small)}</div>')
        if not several:
            parts.append(_validations(self._reports[0]))
        return _section("curves", _word("curves"), *parts)

    def _line(self, name: str, table: str, field: str, form: str, group: int | None) -> str:
        values = [row[field] for row in self.tables[table] if row[field] is not None and group in (None, row["group"])]
        if not values:
            return ""
        label = f"{field.replace('_', ' ')}: {values[0]:,.4g} … {values[-1]:,.4g}"
        return self._chart(name, charts.line_chart(table, field, form, self._overlay(group)), label)

    def _overlay(self, group: int | None) -> charts.Overlay:
        names = [each.name for each in self._reports]
        members = names if group is None else [each.name for each in self._groups[group]]
        return charts.Overlay(names, members, group)

    # Predictions ----------------------------------------------------------------------------------------------------

    def _sentences(self, number: int, report: RunReport) -> str:
        title = _word("sentences")
        if not report.previews:
            return _section(f"sentences-{number}", title, f"<p>{_word('no_sentences')}</p>")
        last = len(report.previews) - 1
        predictions = [span for each in report.previews for line in each.lines for span in line if span[1] != "plain"]
        letters = all(len(span[2]) <= 1 for span in predictions)
        self.sentences.append({
            "steps": [{"step": each.step, "lines": each.lines} for each in report.previews],
            "last": report.summary.steps,
            "letters": letters,
        })  # fmt: skip
        lines = ["".join(_span(span, letters) for span in line) for line in report.previews[-1].lines]
        shown = "".join(f"<p>{line}</p>" for line in lines)
        wrong = "wrong" if letters else "wrong_truth"
        slider = (
            f'<div class="slider"><input type="range" min="0" max="{last}" value="{last}" autocomplete="off" '
            f'data-t-label="slider" aria-label="{words()["slider"][0]}"><output aria-live="polite"></output></div>'
        )
        return _section(
            f"sentences-{number}",
            title,
            f'<p class="muted">{_word("sentences_note")} <mark class="correct">{_word("correct")}</mark> '
            f'<mark class="wrong">{_word(wrong)}</mark></p>',
            f'<div data-sentences="{len(self.sentences) - 1}">{slider}<div class="sentences">{shown}</div></div>',
        )

    def _predictions(self, number: int, report: RunReport) -> str:
        result = report.details
        if result is None:
            return _section(f"details-{number}", _word("details"), f"<p>{_word(report.no_details)}</p>")
        step = report.model.step if report.model and report.model.step is not None else report.summary.step
        values = (f"{step:,}", f"{result.masked_tokens:,}", f"{result.loss:.3f}", f"{result.accuracy:.1%}")
        parts = [f"<p>{_word('details_note', *values)}</p>"]
        tables: list[str] = []
        figures: list[str] = []
        for name in _GROUPS:
            groups = getattr(result.details, name)
            table = f"groups-{name}-{number}"
            self.tables[table] = [
                {"name": f"@w:{each.name}" if each.name in words() else each.name, "accuracy": each.accuracy}
                for each in groups
            ]
            label = ", ".join(f"{each.name} {each.accuracy:.1%}" for each in groups)
            chart = self._chart(table, charts.groups_chart(table, len(groups)), f"accuracy: {label}")
            figures.append(f"<div><h3>{_word(name)}</h3>{chart}</div>")
            header = [_word(name), *map(_word, ("masked_tokens", "accuracy", "loss_column", "unigram_column"))]
            rows = [
                [_word(each.name) if each.name in words() else _text(each.name), f"{each.masked_tokens:,}",
                 f"{each.accuracy:.2%}", f"{each.loss:.4f}", f"{each.unigram_loss:.4f}"]
                for each in groups
            ]  # fmt: skip
            tables.append(_table(header, rows))
        figures.append(self._calibration(number, report))
        parts.append(f'<div class="grid">{"".join(figures)}</div>{_details(_word("numbers"), "".join(tables))}')
        return _section(f"details-{number}", _word("details"), *parts)

    def _calibration(self, number: int, report: RunReport) -> str:
        assert report.details is not None
        calibration, table = report.details.details.calibration, f"calibration-{number}"
        self.tables[table] = [
            {"confidence": each.confidence, "accuracy": each.accuracy, "masked_tokens": each.masked_tokens}
            for each in calibration.bins
        ]
        values = (f"{calibration.error:.1%}", f"{calibration.confidence:.1%}", f"{report.details.accuracy:.1%}")
        label = f"expected calibration error {values[0]}, mean confidence {values[1]}, accuracy {values[2]}"
        chart = self._chart(table, charts.calibration_chart(table), label, _word("calibration_note", *values))
        return f"<div><h3>{_word('calibration')}</h3>{chart}</div>"

    def _pairs(self, number: int, report: RunReport) -> str:
        last = report.last_pairs
        if last is None:
            return _section(f"pairs-{number}", _word("pairs"), f"<p>{_word('no_pairs')}</p>")
        table = f"pairs-{number}"
        self.tables[table] = [self._in_unit(row) for row in report.pairs]
        rows: list[list[str]] = []
        for method, result in last["methods"].items():
            groups = [(_word("overall"), result["overall"])]
            groups += [(_text(name), each) for name, each in list(result["paradigms"].items())[:_MAX_PARADIGMS]]
            for name, each in groups:
                low, high = each["interval"]
                values = [f"{each['accuracy']:.1%}", f"{low:.0%} – {high:.0%}"]
                rows.append([name, _text(method), *values, f"{each['pairs']:,}", f"{each['ties']:,}"])
        label = ", ".join(f"{method} {each['overall']['accuracy']:.1%}" for method, each in last["methods"].items())
        header = [_word(name) for name in ("paradigm", "method", "accuracy", "interval", "pairs", "ties")]
        note = _word("pairs_note", f"{last['pairs']:,}", last["paradigms"])
        return _section(
            f"pairs-{number}",
            _word("pairs"),
            self._chart(table, charts.pairs_chart(number), f"accuracy on minimal pairs: {label}", note),
            _details(_word("numbers"), _table(header, rows, numbers_from=2)),
        )


# A run ----------------------------------------------------------------------------------------------------------------


def _state(report: RunReport) -> str:
    summary = report.summary
    style = "" if summary.state == "finished" else ' class="warning"'
    return f"<p{style}>{_word(f'state_{summary.state}', f'{summary.step:,}', f'{summary.steps:,}')}</p>"


def _loss_text(report: RunReport) -> str:
    """Describe the curve of the validation loss to screen readers."""
    if not report.validations:
        return words()["no_validation"][0]
    first, last = report.validations[0], report.validations[-1]
    values = [_number(first["loss"]), f"{first['step']:,}", _number(last["loss"]), f"{last['step']:,}"]
    return words()["loss_text"][0].format(*values, _number(last["unigram_loss"]))


def _cards(report: RunReport) -> str:
    summary, last = report.summary, report.last_validation
    best = ""
    if summary.best_loss is not None and summary.best_step != summary.step:
        best = f"; {_word('best_at', f'{summary.best_loss:.3f}', f'{summary.best_step:,}')}"
    cards: list[tuple[str, str, str]] = []
    if last:
        unigram = _word("unigram_is", _number(last["unigram_loss"], ".2f"))
        cards += [
            ("validation_loss", _number(summary.loss), unigram + best),
            ("accuracy", _number(summary.accuracy, ".1%"), _word("of_masked", f"{last['masked_tokens']:,}")),
            ("bits_per_character", _number(summary.bits_per_character), _word("bits_note")),
        ]
    seconds, planned = summary.seconds, report.plan.seconds
    if seconds is not None:
        cards.append(("time", duration(seconds), _word("planned", duration(planned)) if planned else ""))
    if summary.tokens is not None:
        train_tokens = int(report.environment["text"]["facts"]["train_tokens"])
        epochs = summary.tokens / max(train_tokens, 1)
        cards.append(("tokens_seen", count(summary.tokens), _word("epochs", f"{epochs:.2g}")))
    if report.model is not None:
        cards.append(("parameters", count(report.model.parameters), _text(report.recipe.model.kind)))
    items = [
        f'<div><dt>{_word(key)}</dt><dd>{value}</dd><dd class="note">{note}</dd></div>' for key, value, note in cards
    ]
    missing = "" if last else f"<p>{_word('no_validation')}</p>"
    return f'<dl class="cards">{"".join(items)}</dl>{missing}'


def _validations(report: RunReport) -> str:
    if not report.validations:
        return ""
    names = ("axis_step", "axis_tokens", "time", "loss_column", "accuracy", "bits_per_character")
    rows = [
        [
            f"{row['step']:,}", f"{row['tokens']:,}", duration(row["seconds"]), _number(row["loss"]),
            _number(row["accuracy"], ".1%"), _number(row["bits_per_character"]),
        ]
        for row in report.validations
    ]  # fmt: skip
    return _details(_word("validations"), _table([_word(name) for name in names], rows, numbers_from=0))


def _span(span: tuple[str, str, str], letters: bool) -> str:
    text, state, truth = span
    if state == "plain":
        return html.escape(text)
    shown = f"{text} → {truth}" if state == "wrong" and not letters else text
    return f'<mark class="{html.escape(state)}">{html.escape(shown)}</mark>'


def _finetuning(number: int, report: RunReport) -> str:
    parts: list[str] = []
    for result in report.finetuned.values():
        label = result.metric.replace("_", " ")
        parts.append(f"<p>{_word('finetuning_of', visible(result.name), result.task, label, result.seeds)}</p>")
        rows = [[_text(cell) for cell in row] for row in result.rows]
        parts.append(_table([_word("method"), _word("valid_column"), _word("test_column")], rows))
        if table := result.confusion:
            split = _word("test_column" if table.split == "test" else "valid_column")
            labels = [_text(label) for label in table.labels]
            counts = [[label, *(f"{n:,}" for n in row)] for label, row in zip(labels, table.counts, strict=True)]
            parts += [f"<p>{_word('confusion', table.seed)}</p>", _table([split, *labels], counts)]
    return _section(f"finetuning-{number}", _word("finetuning"), *(parts or [f"<p>{_word('no_finetuning')}</p>"]))


def _text_section(number: int, report: RunReport) -> str:
    text, facts = report.environment["text"], report.environment["text"]["facts"]
    paths = [Path(str(path)).name for path in text["paths"]]
    named = _text(join_names(paths, 4)) if paths else _word("in_memory")
    listed = text.get("files")  # of a text in files
    num_files = len(listed) if isinstance(listed, list) else 0
    if num_files > 1:
        named += f" ({_word('files', f'{num_files:,}')})"
    rows = [
        [_word(name), f"{facts[f'train_{name}']:,}", f"{facts[f'held_out_{name}']:,}"]
        for name in ("documents", "characters", "tokens", "unknown_characters")
    ]
    per_token = facts["train_characters"] / max(facts["train_tokens"], 1)
    kind = report.summary.tokenizer_kind
    tokenizer = _word("tokenizer_is", kind, f"{facts['vocabulary']:,}", f"{per_token:.2f}")
    return _section(
        f"text-{number}",
        _word("text"),
        _table(["", ""], [[_word("text_names"), named], [_word("tokenizer"), tokenizer]], numbers_from=2),
        _table(["", _word("for_training"), _word("held_out")], rows),
    )


def _plan(number: int, report: RunReport) -> str:
    plan, summary = report.plan, report.summary
    planned = plan.training_seconds(plan.steps)
    trained = report.training_seconds

    def seconds(value: float | None) -> str:
        return duration(value) if value else "–"

    rows = [
        [_word("steps"), f"{plan.steps:,}", f"{summary.step:,}"],
        [_word("tokens"), count(plan.tokens), "–" if summary.tokens is None else count(summary.tokens)],
        [_word("time"), seconds(plan.seconds), seconds(summary.seconds)],
        [_word("training_time"), seconds(planned), seconds(trained)],
        [
            _word("tokens_per_second"),
            f"{plan.tokens / planned:,.0f}" if planned else "–",
            f"{(summary.tokens or 0) / trained:,.0f}" if trained else "–",
        ],
    ]
    guards = {name: getattr(report, name) for name in ("skipped_steps", "rollbacks", "loss_spikes")}
    rows += [[_word(name), "–", f"{total:,}"] for name, total in guards.items() if total]
    stages = [
        [str(index), f"{stage.max_seq_len:,}", f"{stage.batch_tokens:,}", f"{stage.steps:,}",
         seconds(stage.steps * stage.seconds_per_step)]
        for index, stage in enumerate(plan.stages, start=1)
    ]  # fmt: skip
    header = [_word(name) for name in ("stage", "max_length", "batch", "steps", "time")]
    return _section(
        f"plan-{number}",
        _word("plan"),
        _table(["", _word("plan_column"), _word("fact_column")], rows),
        _table(header, stages, numbers_from=0),
        _other_results(report),
    )


def _other_results(report: RunReport) -> str:
    """Return results of the last validation besides those of masked tokens: further texts, pairs, the objective."""
    last = report.last_validation
    rows = [
        [_text(name), _number(result["loss"]), _number(result["unigram_loss"]), _number(result["accuracy"], ".1%"),
         _number(result["bits_per_character"])]
        for name, result in last.get("sets", {}).items()
    ]  # fmt: skip
    header = [_word(name) for name in ("text_names", "loss_column", "unigram_column", "accuracy", "bits_per_character")]
    own = dict(last.get("objective") or {})
    if pair := last.get("pair"):
        own |= {f"sentence pairs: {name}": pair[name] for name in ("accuracy", "loss")}
    values = [[_text(name), _number(value, ".4f")] for name, value in own.items() if isinstance(value, float)]
    parts = ([_table(header, rows)] if rows else []) + ([_table(["", ""], values)] if values else [])
    return f"<h3>{_word('other_results')}</h3>{''.join(parts)}" if parts else ""


def _repeat(number: int, report: RunReport) -> str:
    environment = report.environment
    facts = {**environment["determinism"], "platform": environment["platform"]}
    machine = [[_text(name), _text(value)] for name, value in facts.items()]
    machine += [[_word("resumed"), _text(each)] for each in environment.get("resumed_in_different_environment", [])]
    digests = [
        [_word("digest_text"), f"<code>{_text(environment['text']['fingerprint'])}</code>"],
        [_word("digest_tokenizer"), f"<code>{_text(environment['text']['tokenizer'])}</code>"],
    ]
    if report.model is not None:
        step = "?" if report.model.step is None else f"{report.model.step:,}"
        digests.append([_word("digest_model", step), f"<code>{_text(report.model.digest)}</code>"])
    recipe = f"<p>{_word('recipe_note')}</p><pre>{_cut(dump_config(report.recipe), _MAX_TEXT)}</pre>"
    return _section(
        f"repeat-{number}",
        _word("repeat"),
        f"<pre>{_cut(_command(report), _MAX_COMMAND)}</pre>",
        _details(_word("recipe"), recipe),
        _details(_word("machine"), _table(["", ""], machine, numbers_from=2)),
        _details(_word("digests"), _table(["", ""], digests, numbers_from=2)),
    )


def _command(report: RunReport) -> str:
    """Return the command that started the run; of a run started from Python, one that repeats it."""
    program, *arguments = chain(map(str, report.environment["command"]), ("",) * 2)
    is_command = Path(program).name in ("unmask", "unmask.exe") or Path(program).parts[-2:] == ("unmask", "__main__.py")
    if is_command and arguments[0] in ("pretrain", "demo"):
        return shlex.join(["unmask", *arguments[:-2]])
    texts = [Path(str(path)).name for path in report.environment["text"]["paths"]] or ["TEXT"]
    return shlex.join(["unmask", "pretrain", *texts, "--recipe", f"{report.name}/recipe.toml", "--out", "NEW"])
