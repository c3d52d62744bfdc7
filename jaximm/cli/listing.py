"""`jaximm list`: everything there is to choose from."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from jaximm.cli.common import Common
from jaximm.cli.output import stdout

if TYPE_CHECKING:
    from jaximm.types import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class List(Common):
    """Methods, attacks, data sets and experiments: what each is, and its source.

    Attributes:
      json: machine-readable.
    """

    json: bool = False


def run_command(args: List, command: str) -> None:
    """Prints the catalogue."""
    del command
    families = catalogue()
    if args.json:
        print(json.dumps(families, indent=1, ensure_ascii=False))
        return
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    console = stdout()
    width = max(len(entry["name"]) for entries in families.values() for entry in entries)
    for family, entries in families.items():
        table = RichTable(
            title=Text(family.capitalize(), style="bold"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_header=False,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column(no_wrap=True, min_width=width)
        table.add_column(overflow="fold")
        for entry in entries:
            about = Text(entry["description"])
            if "kind" in entry:  # an attacker
                about = Text(f"{entry['title']}: {entry['description']} [{entry['kind']}]")
                about += Text(f"\nIt {entry['threat_model']}.")
            elif entry.get("threat_model"):  # a method
                about += Text(f"\nIt is {entry['threat_model']}.")
            table.add_row(Text(entry["name"]), about + Text(f"\n{entry['source']}", style="dim"))
        console.print(table)


def catalogue() -> dict[str, list[Json]]:
    """Everything there is to choose from: ``{family: [{name, description, source, ...}]}``."""
    from jaximm import attacks, data, immunisers, models
    from jaximm.run import EXPERIMENTS

    families = {
        "methods": [_said(immunisers.describe(name)) for name in immunisers.REGISTRY],
        "attacks": [_said(attacks.describe(name)) for name in attacks.REGISTRY],
        "attacks on weights": [_said(attacks.describe(name)) for name in attacks.WEIGHT_REGISTRY],
        "data sets": [_entry(*item) for item in data.REGISTRY.items()],
    }
    families["models"] = [
        {
            "name": name,
            "description": (type(spec.config).__doc__ or "").strip().partition("\n")[0],
            "source": spec.source,
        }
        for name, spec in models.REGISTRY.items()
    ]
    families["experiments"] = [
        {
            "name": name,
            "description": experiment.description,
            "source": _entry(experiment.data, data.REGISTRY[experiment.data])["source"],
        }
        for name, experiment in EXPERIMENTS.items()
    ]
    return families


def _said(of_itself: Json) -> Json:
    """What an attacker or a method says of itself, its sentence under the key of every family."""
    return {"description": of_itself.pop("what")} | of_itself


def _entry(name: str, entry: tuple[type, object]) -> dict[str, str]:
    """Name, first docstring line and source of a registry entry."""
    config_class = entry[0]
    module = config_class.__module__
    source = getattr(sys.modules.get(module), "SOURCE", "") or f"module {module}"
    text = (config_class.__doc__ or "").strip()
    return {"name": name, "description": text.partition("\n")[0], "source": source}
