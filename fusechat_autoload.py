"""What PyTorch calls at the end of `import torch`: no exception may leave this module.

An editable install copies this file beside torch (see setup.py): the entry point has to stay
importable when the folder that was installed is gone.
"""

import sys
from contextlib import suppress


def install() -> None:
    """Import `fusechat_merge`, which watches for mergekit; do nothing where it is gone."""
    try:
        import fusechat_merge  # noqa: F401
    except ModuleNotFoundError:
        pass
    except Exception as error:
        with suppress(Exception):
            sys.stderr.write(f"fusechat: mergekit won't know varm and fusechat_sce: {error!r}\n")
