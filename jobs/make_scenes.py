"""Make the built-in synthetic data set: shards of drawn scenes, for training and evaluation.

Scenes hold several objects each; their hundreds of labels form a hierarchy with a long tail.

python jobs/make_scenes.py --directory data --num-train 4000
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from datapipe.errors import DataError
from datapipe.scenes.making import ScenesConfig, ensure_scenes


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    directory: Path
    """The scenes come into a directory of their own below this one, named after the rest."""
    scenes: Annotated[ScenesConfig, tyro.conf.arg(name="")] = field(default_factory=ScenesConfig)
    """Which scenes."""


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what the user can mend."""
    try:
        parsed = tyro.cli(Arguments, args=arguments, description=__doc__)
        made = ensure_scenes(parsed.directory, parsed.scenes)
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts over", file=sys.stderr)
        return 130
    print(f"synthetic scenes for training:   {made.train}")
    print(f"synthetic scenes for evaluation: {made.evaluation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
