"""The report as one HTML file that needs nothing else: no script, no font, no address."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from pipelines.pictures import plots
from pipelines.reporting.compare import Setting, differing
from pipelines.reporting.facts import Facts

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1c2530;max-width:1200px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid #dde2e8}
td{vertical-align:top}td:first-child{min-width:14rem}
.wide{overflow-x:auto}.pictures{display:flex;gap:1rem;overflow-x:auto}
.curves{display:flex;flex-wrap:wrap;gap:1rem}.curves svg{width:590px}
figure{margin:0}figure img{max-height:640px}figcaption{color:#5b6673;font-size:.85rem}
svg{max-width:100%;height:auto}
"""
MAX_PICTURES = 12
ALONE_MARK = "*"
ALONE = (
    "over images alone: an interval over seeds takes three of one setting, or two of each of two"
)
PLOTS = ("probes.png", "time.png")


def page(title: str, shared: str, runs: Sequence[Facts], settings: Sequence[Setting]) -> str:
    """The whole file. `shared` is what the names of all runs have in common."""
    parts = [
        f"<h1>{escape(title)}</h1><p><b>{escape(_sentence(settings))}</b></p>",
        f"<p>Of all runs: {escape(shared)}.</p>" if shared else "",
        _section("Settings", _settings_table(settings), _forest(settings)),
        _section("Runs", _runs_table(runs)),
        _section("What differs", _differences_table(runs)),
        _section("Curves", f'<div class="curves">{"".join(_curves(runs, settings))}</div>'),
        _section("The same images", *_pictures(runs, of_images=True)),
        _section("Figures", *_pictures(runs, of_images=False)),
        _section("Made from", _lineage_table(runs)),
        _section("Cost", _cost_table(runs)),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def _sentence(settings: Sequence[Setting]) -> str:
    judged = [one for one in settings if one.mean is not None]
    if not judged:
        return "None of these runs was evaluated; `beit evaluate --run RUN` says what they know."
    best = max(judged, key=lambda one: one.mean or 0.0)
    alone = len(settings) == 1
    text = "Linear probe: " if alone else f"Best linear probe: {best.label}, "
    text += f"{_percent(best.mean)} %"
    if best.spread is not None:
        text += f" ± {_percent(best.spread)} over {len(best.runs)} seeds"
    if best.difference is not None:
        text += f"; {_gain(best.difference)} points against {settings[0].label}"
        if not best.difference_of_seeds:
            text += " (over images alone)"
    return text + "."


def _section(heading: str, *contents: str) -> str:
    kept = [content for content in contents if content]
    return f"<section><h2>{escape(heading)}</h2>{''.join(kept)}</section>" if kept else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> str:
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table id="{name}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _settings_table(settings: Sequence[Setting]) -> str:
    rows = [
        (
            one.label,
            str(len(one.runs)),
            _percent(one.mean),
            _marked(" to ".join(map(_percent, one.interval or ())), one.interval_of_seeds),
            _percent(one.spread),
            _marked(_gain(one.difference) if one.difference else "", one.difference_of_seeds),
        )
        for one in settings
    ]
    against = f"points against {settings[0].label} [95 %, in pairs]"
    head = ("setting", "seeds", "linear probe %, mean", "95 %", "spread over seeds", against)
    marked = any(ALONE_MARK in row[3] + row[5] for row in rows)
    count = len(head) if len(settings) > 1 else -1  # alone it is against nothing
    table = _table(head[:count], [row[:count] for row in rows], "settings")
    return table + (f"<p>{ALONE_MARK} {ALONE}.</p>" if marked else "")


def _marked(interval: str, of_seeds: bool) -> str:
    return interval if of_seeds or not interval else f"{interval} {ALONE_MARK}"


def _forest(settings: Sequence[Setting]) -> str:
    rows = [
        (_marked(one.label, one.difference_of_seeds), *one.difference)
        for one in settings
        if one.difference is not None
    ]
    if not rows:
        return ""
    return plots.forest_svg(
        [(label, 100 * gain, 100 * low, 100 * high) for label, gain, low, high in rows],
        title="Linear probe against the first setting",
        x_label="points, paired 95 % intervals",
    )


def _runs_table(runs: Sequence[Facts]) -> str:
    names = [name for name in _curve_names(runs) if name != "images_per_second"]
    head = ["run", "status", "linear probe % [95 %]"]
    head += [f"{name}, {which}" for name in names for which in ("last", "best")]
    rows = []
    for run in runs:
        judged = run.judgement
        row = [run.name, run.status]
        row.append(
            f"{_percent(judged.accuracy)} [{_percent(judged.low)}, {_percent(judged.high)}]"
            if judged
            else ""
        )
        for name in names:
            values = run.curves.get(name, ([], []))[1]
            best = min if "loss" in name else max
            row += [f"{values[-1]:.4g}", f"{best(values):.4g}"] if values else ["", ""]
        rows.append(row)
    return _table(head, rows, "runs")


def _differences_table(runs: Sequence[Facts]) -> str:
    found = differing(runs)
    if not found:
        return ""
    rows = [
        (run.name, *("" if value is None else str(value) for value in values))
        for run, *values in zip(runs, *found.values(), strict=True)
    ]
    return _table(("run", *found), rows, "differences")


def _curve_names(runs: Sequence[Facts]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.curves))


def _curves(runs: Sequence[Facts], settings: Sequence[Setting]) -> list[str]:
    """Of more runs than a legend can name, those of one setting have one colour: the first
    setting's and those of the best."""
    kinds = {run.name: one.label for one in settings for run in one.runs}
    drawn = []
    for name in _curve_names(runs):
        series = {run.name: run.curves[name] for run in runs if name in run.curves}
        drawn.append(
            plots.curve_svg(
                series,
                title=name,
                kinds=kinds if len(series) > plots.MAX_LEGEND else None,
            )
        )
    return drawn


def _pictures(runs: Sequence[Facts], *, of_images: bool) -> list[str]:
    """One row a kind of picture; runs show the same images where seed and tables are the same."""
    rows = []
    for kind in dict.fromkeys(name for run in runs for name in run.pictures):
        if (kind not in PLOTS) is not of_images:
            continue
        having = [run for run in runs if kind in run.pictures]
        shown = having[:MAX_PICTURES]
        figures = "".join(
            f'<figure><img alt="{escape(kind)} of {escape(run.name)}" '
            f'src="data:image/png;base64,{base64.b64encode(run.pictures[kind]).decode()}">'
            f"<figcaption>{escape(run.name)}</figcaption></figure>"
            for run in shown
        )
        if len(having) > len(shown):
            rows.append(f"<p>{escape(kind)}: the first {len(shown)} of {len(having)} runs.</p>")
        rows.append(f'<div class="pictures">{figures}</div>')
    return rows


def _lineage_table(runs: Sequence[Facts]) -> str:
    rows = [
        (
            run.name,
            kind.replace("_", " "),
            fingerprint[:12],
            next((p.name for p in run.node.parents if p.outputs.get(kind) == fingerprint), "?"),
        )
        for run in runs
        for kind, fingerprints in run.node.inputs.items()
        for fingerprint in fingerprints
    ]
    return _table(("run", "read", "fingerprint", "made by"), rows, "lineage") if rows else ""


def _cost_table(runs: Sequence[Facts]) -> str:
    def figure(run: Facts, name: str) -> str:
        value = run.cost.get(name)
        if value is None:
            return "?"
        return f"{value:,.0f}" if name == "images" else f"{value:,.2f}"

    names = ("device_hours", "images", "gigabytes")
    rows = [(run.name, *(figure(run, name) for name in names)) for run in runs]
    return _table(("run", "device-hours", "images seen", "GB kept"), rows, "cost")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _gain(difference: tuple[float, float, float]) -> str:
    gain, low, high = (f"{100 * value:+.1f}" for value in difference)
    return f"{gain} [{low}, {high}]"
