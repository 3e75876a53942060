"""The directory that shards are packed into: empty at first, then marked with its plan."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from datapipe.errors import PackingError
from datapipe.index import MANIFEST_NAME, UNFINISHED_NAME
from datapipe.packing_plan import PackPlan, continued
from datapipe.sources import ImageFile
from datapipe.storage import absolute, join, local_path, names_in, read_bytes, write_bytes
from datapipe.writer import shard_name


def begin(directory: str, plan: PackPlan) -> PackPlan:
    """Mark the directory with the plan, or go on with the one that it is marked with.

    Raises `PackingError` if it holds a data set, tars that are none of the plan's, or another plan.
    """
    names = names_in(directory)
    if UNFINISHED_NAME in names:
        mark = read_bytes(join(directory, UNFINISHED_NAME))
        plan = continued(plan, mark, where=directory)
    elif MANIFEST_NAME in names:
        manifest_url = join(directory, MANIFEST_NAME)
        raise PackingError(f"{manifest_url} exists; choose another directory, or remove this one")
    prefix = str(plan.facts["prefix"])
    is_begun = UNFINISHED_NAME in names
    ours = {shard_name(prefix, number) for number in range(plan.num_shards)} if is_begun else set()
    foreign = sorted(name for name in names - ours if name.endswith(".tar"))
    if foreign:
        raise PackingError(f"{directory} holds {foreign[0]}; choose an empty directory")
    if not is_begun:
        # Parts that begin at the same time all write it, and the same.
        write_bytes(join(directory, UNFINISHED_NAME), plan.to_bytes(), by=uuid4().hex)
    return plan


def check_apart(images: Sequence[ImageFile], directory: str) -> None:
    """Raise `PackingError` if an image, or the tar it is in, lies where shards are written."""
    output = local_path(absolute(directory))
    if output is None:
        return
    output = output.resolve()
    for folder in {path.parent for path in {image.path for image in images}}:
        if folder.resolve().is_relative_to(output):
            raise PackingError(
                f"{directory}: images to be packed lie in {folder}; choose another directory"
            )
