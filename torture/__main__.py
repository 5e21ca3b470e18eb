"""`python -m torture`: attack a mesh of real agents, and say whether anything acknowledged was lost, doubled or stuck."""

from __future__ import annotations

import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import click

from torture import disks, network, plan, report
from torture.faults import FAKETIME
from torture.processes import NeverReady
from torture.run import Options, Torture, torture

SCRATCH = Path(__file__).parents[1] / "build"
"""On a disk: where the directory for temporary files lies in memory, a sync costs nothing."""
RESULTS = SCRATCH / "torture"
LEADER_P95_S = 2.0
"""Between the kill of a leader under load and the next acknowledged write."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cycles", type=click.IntRange(1), default=50, show_default=True, help="Kill cycles.")
@click.option("--nodes", type=click.Choice(["3", "5"]), default="3", show_default=True)
@click.option("--seed", type=int, help="Of every choice.  [random]")
@click.option("--faults", default=",".join(plan.DEFAULT_FAULTS), show_default=True, help="Which, separated by commas.")
@click.option(
    "--only", "drill", type=click.Choice(plan.DRILLS), help="One fault again and again, each on a whole mesh."
)
@click.option("--engine", type=click.Choice(["meshd", "stock"]), default="meshd", show_default=True)
@click.option("--rate", type=float, default=15.0, show_default=True, help="Submissions a second, of all clients.")
@click.option("--clients", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option(
    "--payload", type=click.IntRange(0, 3000), default=0, show_default=True, help="Bytes more in most submissions."
)
@click.option("--check-every", type=click.IntRange(1), default=50, show_default=True, help="Cycles between two checks.")
@click.option("--keep-going", is_flag=True, help="Go on after a check that failed.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Where the results go.  [build/torture]")
def main(
    cycles: int, nodes: str, seed: int | None, faults: str, drill: str | None, engine: str, rate: float, clients: int,
    payload: int, check_every: int, keep_going: bool, out: Path,
) -> None:  # fmt: skip
    """Attack a mesh of real agents under load; end with one line and exit 1 if anything was lost, doubled or stuck."""
    chosen = tuple(fault for fault in faults.split(",") if fault)
    if unknown := set(chosen) - set(plan.FAULTS):
        raise click.UsageError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(plan.FAULTS)}")
    if plan.Weather.CLOCK in chosen and FAKETIME is None:
        click.echo("clocks stay as they are: faketime is not installed")
        chosen = tuple(fault for fault in chosen if fault != plan.Weather.CLOCK)
    if lack := network.lacks():
        raise click.ClickException(lack)
    for name in (*network.remove_stale(), *disks.remove_stale()):
        click.echo(f"removed what an earlier run left: {name}")
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    SCRATCH.mkdir(exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="torture-", dir=SCRATCH))
    options = Options(
        cycles, int(nodes), seed, engine, home, chosen, clients=clients, rate_s=rate, check_every=check_every,
        keep_going=keep_going, payload_bytes=payload, drill=drill or "",
    )  # fmt: skip
    click.echo(f"seed {seed}, {nodes} nodes of {engine}, {drill or ', '.join(chosen)}; everything in {home}")
    begun_s = time.monotonic()
    try:
        found = torture(options, lambda text: click.echo(f"{time.monotonic() - begun_s:7.1f}  {text}"), _stop_in_order)
    except NeverReady as error:
        raise click.ClickException(f"{error}; look at {home}/*.log") from error
    click.echo(f"\n{report.table(found)}")
    click.echo(f"written to {found.write(out)}")
    if found.is_good:
        shutil.rmtree(home)
    else:
        click.echo(f"kept: {home}: NODE.log, history.jsonl (what clients saw), round*.traces (what attempts did)")
        click.echo(
            f"again: {found.command} --seed {seed}" if "--seed" not in found.command else f"again: {found.command}"
        )
    failures = _missed(found, drill)
    for failure in failures:
        click.echo(failure)
    click.echo(found.line)
    sys.exit(0 if found.is_good and not failures else 1)


def _missed(found: report.Report, drill: str | None) -> list[str]:
    """What a drill promises beyond that nothing is lost, and did not keep."""
    failures = []
    p95_s = report.quantile((each.silence_s for each in found.done), 0.95)
    if drill == "leader-kills" and p95_s > LEADER_P95_S:
        failures.append(
            f"missed: writes were accepted again after {p95_s:.2f} s (p95), not within {LEADER_P95_S:.0f} s"
        )
    if drill == "follower-kills" and found.client_errors:
        failures.append(f"missed: clients saw {len(found.client_errors)} errors")
    return failures


def _stop_in_order(run: Torture) -> None:
    """The first ctrl-c ends the run with its check, the second one at once."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        if run.is_stopping:
            raise KeyboardInterrupt
        run.is_stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


main()
