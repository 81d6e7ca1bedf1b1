"""`hawthorn quorum`: how often attackers dominate a round, before anything is trained."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from certify.quorum import Quorum, median_tolerates


def quorum(
    num_clients: Annotated[int, typer.Option(help="Clients in the federation.")],
    malicious: Annotated[int, typer.Option(help="Malicious ones among them.")],
    per_round: Annotated[int, typer.Option(help="Clients sampled each round.")],
    rounds: Annotated[int, typer.Option(help="Rounds of the run.")] = 1,
    tolerated: Annotated[
        int | None, typer.Option(help="Attackers in a round that the rule withstands; default: a median's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how likely attackers are to outnumber what the rule withstands, in a round and in a run."""
    most = median_tolerates(per_round) if tolerated is None else tolerated
    found = Quorum(num_clients=num_clients, malicious=malicious, per_round=per_round, tolerated=most)
    values = {
        "tolerated": most,
        "dominated_round": float(found.dominated),
        "dominated_run": found.dominated_within(rounds),
        "expected_rounds": found.expected(rounds),
        "drawn": [float(found.drawn(number)) for number in range(per_round + 1)],
    }
    if as_json:
        print(json.dumps(values))
        return
    console = Console(markup=False, highlight=False)
    console.print(f"{malicious} of {num_clients} clients are malicious; the rule withstands {most} of {per_round}")
    table = Table("attackers in a round", "probability", "")
    for number, chance in enumerate(values["drawn"]):
        table.add_row(str(number), f"{chance:.6g}", "dominated" if number > most else "")
    console.print(table)
    console.print(f"a round is dominated with probability {values['dominated_round']:.6g}")
    console.print(f"at least one of {rounds} rounds: {values['dominated_run']:.6g}")
    console.print(f"dominated rounds on average: {values['expected_rounds']:.4g} of {rounds}")
