import re

import pytest

from tests import conftest


@pytest.mark.parametrize("root", [None, ""])
def test_without_the_real_drive(root, monkeypatch, request):
    if root is None:
        monkeypatch.delenv("DRIVE_ROOT", raising=False)
    else:
        monkeypatch.setenv("DRIVE_ROOT", root)
    conftest.pytest_configure()
    with pytest.raises(pytest.skip.Exception, match="DRIVE_ROOT"):
        request.getfixturevalue("real_drive")


def test_a_folder_without_drive(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIVE_ROOT", str(tmp_path))
    with pytest.raises(pytest.UsageError, match=rf"DRIVE_ROOT={re.escape(str(tmp_path))}: no folder DRIVE in it; name"):
        conftest.pytest_configure()
    (tmp_path / "DRIVE").mkdir()
    conftest.pytest_configure()
