"""The public names of fusechat_distill: all there, and none imported before it is used."""

import subprocess
import sys

import pytest

import fusechat_distill


def test_every_public_name_is_there():
    for name in fusechat_distill.__all__:
        assert callable(getattr(fusechat_distill, name)), name
        assert name in dir(fusechat_distill)
    with pytest.raises(AttributeError, match=r"^module 'fusechat_distill' has no attribute 'token"):
        _ = fusechat_distill.token_byte


def test_the_package_alone_imports_the_standard_library_only():
    code = (
        "import sys\nbefore = set(sys.modules)\nimport fusechat_distill\n"
        "assert 'FusionTrainer' in dir(fusechat_distill)\n"
        "imported = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(imported - sys.stdlib_module_names))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "['fusechat_distill']\n", result.stderr
