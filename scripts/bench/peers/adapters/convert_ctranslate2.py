"""A model directory in CTranslate2's form: `convert_ctranslate2.py MODEL DTYPE FOLDER`."""

import json
import sys
from pathlib import Path

from ctranslate2.converters import TransformersConverter


def main() -> None:
    model, dtype, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    TransformersConverter(model).convert(str(out), quantization=dtype)
    # The model's tokenizer has no special tokens, and the generator takes no nulls; answers run to their limits anyway.
    config = json.loads((out / "config.json").read_text())
    some = json.loads((out / "vocabulary.json").read_text())[0]
    (out / "config.json").write_text(
        json.dumps({key: some if value is None else value for key, value in config.items()})
    )


main()
