"""One experiment, and its run that nobody stopped, for the files of this folder."""

from __future__ import annotations

import pytest
import runs


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return runs.experiment(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def whole(file):
    """whole(shape) -> the content of a run that nobody stopped, and its stages' seconds."""
    made = {}

    def make(shape):
        if shape not in made:
            # Twice: the second one has everything compiled, as those that are killed.
            runs.finish(file, file.parent / f"first-{shape[1]}", shape)
            folder = runs.finish(file, file.parent / f"whole-{shape[1]}", shape)
            made[shape] = runs.content(folder), runs.stages(folder)
        return made[shape]

    return make
