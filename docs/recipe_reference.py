"""Writes docs/recipe.md and docs/recipe.schema.json from the recipe's own models.

`python docs/recipe_reference.py`; with `--check` it writes nothing and fails where they differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fusechat_distill.recipe.reference import reference_page, schema

INTRODUCTION = """\
# The recipe, key by key

Written by `python docs/recipe_reference.py` from `fusechat_distill/recipe/schema.py`; not edited
by hand. [distilling.md](distilling.md) says how to choose. `fusechat-distill init` writes a recipe
with every key, its default and its meaning.

Omitted keys have their defaults. An unknown key, a duplicate key, and a value of the wrong type are
errors; `fusechat-distill validate` lists each with the expected values. `5e-6` is a number.

With a JSON schema, an editor completes, explains and checks the keys. Write it once, beside your
recipe:

    fusechat-distill schema > recipe.schema.json

Then begin the recipe with this line for the YAML language server, which Visual Studio Code's YAML
extension and other editors use:

```yaml
# yaml-language-server: $schema=recipe.schema.json
output: runs/fusechat
pivot: openchat/openchat_3.5
sources: [NousResearch/Nous-Hermes-2-SOLAR-10.7B]
dataset: FuseAI/FuseChat-Mixture
```

The same schema is in [recipe.schema.json](recipe.schema.json). It has every key of this page. The
fields of TRL's `SFTConfig` and PEFT's `LoraConfig` depend on the installed versions; only
`validate` checks them.

"""


def pages() -> dict[str, str]:
    """Each file's name and content."""
    return {
        "recipe.md": INTRODUCTION + reference_page(),
        "recipe.schema.json": json.dumps(schema(), indent=2, ensure_ascii=False) + "\n",
    }


def main() -> None:
    folder = Path(__file__).parent
    for name, content in pages().items():
        path = folder / name
        if "--check" not in sys.argv[1:]:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            sys.exit(f"{path} is not what this script writes: python docs/recipe_reference.py")


if __name__ == "__main__":
    main()
