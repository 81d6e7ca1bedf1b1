"""Hawthorn: mixings and a rule, as the federation runs them on the stack of a round's updates."""

import inspect

from benchmarks.rule_peers import Call, Case
from strategies.context import RoundContext
from strategies.pipeline import Pipeline
from tasks import spec
from tasks.errors import HawthornError

# Rows that are more than a rule of that name with the arguments below. {f}: the number of attackers.
CHAINS = {
    "bulyan": "bulyan(num_byzantine={quarter})",
    "geometric_median, 50 steps": "geometric_median()",
    "centered_clipping": "centered_clipping(num_steps=5)",
    "nearest_neighbours | mean": "nearest_neighbours(num_byzantine={f}) | mean()",
    "nearest_neighbours | median": "nearest_neighbours(num_byzantine={f}) | median()",
    "nearest_neighbours | geometric_median": "nearest_neighbours(num_byzantine={f}) | geometric_median()",
    "bucketing | mean": "bucketing(bucket_size=2) | mean()",
    "bucketing | median": "bucketing(bucket_size=2) | median()",
    "arc | mean": "arc(num_byzantine={f}) | mean()",
    "clip_norms | mean": "clip_norms(max_norm=100.0) | mean()",
}
VALUES = {"num_byzantine": "{f}", "trusted": "0", "max_norm": "100.0", "std": "0.01", "threshold": "0.5"}
CHOICES = {"foolsgold": {"features": "'all'"}}  # arguments that have a default which does not fit here


def rows() -> list[str]:
    """Return the names of all rows: every rule there is, and some chains."""
    rules = list(spec.names("rule"))
    for name in [name for name in CHAINS if name.split(",")[0] in rules and name not in rules]:
        rules.insert(rules.index(name.split(",")[0]) + 1, name)
    return rules + [name for name in CHAINS if name not in rules]


def text(row: str, case: Case) -> str:
    """Return what a row runs, as it stands in a setting."""
    if row not in CHAINS:
        needed = spec.hyper_parameters(spec.find("rule", row)).values()
        values = {p.name: VALUES[p.name] for p in needed if p.default is inspect.Parameter.empty}
        values |= CHOICES.get(row, {})
        chain = f"{row}({', '.join(f'{name}={value}' for name, value in values.items())})"
    else:
        chain = CHAINS[row]
    return chain.format(f=case.f, quarter=quarter(case))


def quarter(case: Case) -> int:
    """Return the most attackers that n >= 4 f + 3 allows, up to f."""
    return min(case.f, (len(case.updates) - 3) // 4)


def prepare(row: str, case: Case) -> Call | str:
    """Return the pipeline's call; every call is a first round, without memory of others."""
    parts = text(row, case).split(" | ")
    try:
        mixing = spec.resolve_chain("mixing", " | ".join(parts[:-1]))
        pipeline = Pipeline(spec.resolve("rule", parts[-1]), mixing)
    except HawthornError as error:
        return str(error)
    clients = list(range(len(case.updates)))

    def fresh() -> RoundContext:
        return RoundContext(clients, seed=1, root=lambda: case.updates[0])

    return Call(lambda context: pipeline.aggregate(case.updates, context).vector, fresh)
