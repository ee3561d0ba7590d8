"""Arguments and options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or the path of a .toml file.")]
CorpusOption = Annotated[Path | None, typer.Option("--corpus", help="Folder that holds the corpora.")]
DsConfigOption = Annotated[str | None, typer.Option("--ds-config", help="A name in ds_configs/, or a .json file.")]
HoursOption = Annotated[
    float | None, typer.Option("--hours", min=0.0, help="Stop training so long after the session began.")
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run directory; default: runs/RECIPE.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key.")]
AllowChangesOption = Annotated[
    bool, typer.Option("--allow-changes", help="Go on with another loss, optimizer, schedule or teacher.precision.")
]
NumGpusOption = Annotated[int | None, typer.Option("--num-gpus", min=1, help="Ranks on this machine; default: all.")]
HostfileOption = Annotated[Path | None, typer.Option("--hostfile", help="DeepSpeed hostfile of several machines.")]
NodeRankOption = Annotated[
    int | None, typer.Option("--node-rank", min=0, help="One command a node: line of this machine in the hostfile.")
]
MasterAddrOption = Annotated[
    str | None, typer.Option("--master-addr", help="Address of the first node; default: its name in the hostfile.")
]
MasterPortOption = Annotated[
    int | None, typer.Option("--master-port", min=1, max=65535, help="Free port of the first node; default: 29500.")
]
