"""The embedded demo model: what `Engine()` serves when it is given no model.

Owns the path of the model folder and of the text it was trained on. It never imports torch or transformers,
so asking for the path costs nothing; `graphgen.demo.train` makes the folder's contents. The engine, the
command line and the tests call `model_folder()`.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_folder() -> Path:
    """Folder of the embedded checkpoint, in the Hugging Face layout.

    Raises FileNotFoundError when the installation lacks the weights.
    """
    folder = _HERE / "model"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded demo model is missing: no model.safetensors in {folder}. Reinstall graphgen, or "
            f"make the model anew with `python -m graphgen.demo.train --out {folder}`"
        )
    return folder


def play_file() -> Path:
    """The text that the model was trained and validated on (UTF-8, plain ASCII in fact).

    Raises FileNotFoundError when the installation lacks it; serving the model does not need it.
    """
    file = _HERE / "shakespeare.txt"
    if not file.is_file():
        raise FileNotFoundError(f"the training text is missing: {file}. Take it from graphgen's source tree")
    return file
