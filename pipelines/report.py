"""`report`: runs side by side in one HTML file, which MLflow gets too.

What MLflow's own comparison does not show: differences with paired intervals, seeds of one setting
as mean and spread, the best value beside the last, only the parameters that differ; of a hundred
runs as of two.
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines import storage
from pipelines.config.report import ReportConfig
from pipelines.errors import InputError
from pipelines.progress import counted
from pipelines.reporting.compare import settings_of, told_apart
from pipelines.reporting.facts import chosen_runs, facts_of
from pipelines.reporting.html import page
from pipelines.tracking import start_run, store
from pipelines.tracking.page import link


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """What was written."""

    output: str
    runs: int
    settings: int
    where: str

    def summary(self) -> str:
        """One line for a person."""
        counts = f"{counted(self.runs, 'run')}, {counted(self.settings, 'setting')}"
        return f"{self.output}: {counts}; {self.where}"


def run(config: ReportConfig) -> ReportResult:
    """Writes the report and attaches it to a run of its own.

    Raises:
        InputError: a run is unknown, or the store does not answer.
    """
    if not config.runs:
        raise InputError("runs = []: give run directories, run ids, experiment:NAME or a query")
    tracking_uri = store.absolute_tracking_uri(config.tracking.uri)
    store.quiet_mlflow()
    client = store.connect(tracking_uri)
    runs = chosen_runs(client, config.runs, config.tracking.experiment, config.max_runs)
    facts = [facts_of(client, run, config.metrics) for run in runs]
    names = [one.name for one in facts]
    shared, facts = told_apart(facts)
    settings = settings_of(facts)
    title = f"{counted(len(facts), 'run')} of {config.tracking.experiment}"
    text = page(title, shared, facts, settings).encode()
    output = storage.absolute(config.output)
    # Without the options of a URI, which may be secret.
    file_name = Path(output if storage.is_local(output) else output.partition("?")[0]).name
    storage.write_bytes(output, text)
    with start_run(
        config.tracking,
        stage="report",
        params={"runs": ",".join(one.info.run_id for one in runs)},
        output=output,
        system_metrics=False,
    ) as tracked:
        tracked.log_artifact_file(file_name, text)
        links = ", ".join(f"[{name}]({link(one)})" for name, one in zip(names, runs, strict=True))
        tracked.set_note(f"{file_name} under Artifacts compares {links}")
    return ReportResult(output=output, runs=len(facts), settings=len(settings), where=tracked.where)
