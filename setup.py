"""An editable install that can't break `import torch`; all else is in pyproject.toml."""

from __future__ import annotations

import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ENTRY_POINT = Path(__file__).with_name("fusechat_autoload.py")


class EditableWheel(editable_wheel):
    """Adds the module of the `torch.backends` entry point to the wheel, instead of its place.

    torch can't be imported where that module can't, which would be so in the whole environment once
    the folder is moved or deleted.
    """

    def run(self) -> None:
        super().run()
        (wheel,) = Path(self.dist_dir).glob("fusechat-*.editable-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        code = ENTRY_POINT.read_bytes()
        digest = urlsafe_b64encode(sha256(code).digest()).decode().rstrip("=")
        (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
        files[record] += f"{ENTRY_POINT.name},sha256={digest},{len(code)}\n".encode()
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in ({ENTRY_POINT.name: code} | files).items():
                archive.writestr(name, content)


setup(cmdclass={"editable_wheel": EditableWheel})
