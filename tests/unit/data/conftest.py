"""The tiny project, once a module."""

import pytest

from tests.project import make_project


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare")
    return folder, make_project(folder)
