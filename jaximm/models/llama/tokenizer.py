"""Text to a decoder's tokens and back, and its chat template; by the library tokenizers.

``pip install jaximm[text]`` brings it; only functions that make a tokenizer import it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaximm.models.weights.errors import Refusal, reading, shown
from jaximm.models.weights.gguf import Gguf, open_gguf
from jaximm.types import Json

_CONTROL = 3  # among GGUF's kinds of tokens


class Tokenizer(NamedTuple):
    """A model's tokenizer.

    Attributes:
      library: ``tokenizers.Tokenizer``.
      template: Jinja, of a conversation; None: the model has none.
      texts: of special tokens, for the template: ``bos_token`` and so on.
      stop: tokens that end an answer.
    """

    library: Any
    template: str | None
    texts: Mapping[str, str]
    stop: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens that it knows, special ones included."""
        return self.library.get_vocab_size()

    @property
    def end(self) -> int | None:
        """The token after a text: that called ``eos_token``, else the first that ends an answer."""
        own = self.texts.get("eos_token")
        token = None if own is None else self.library.token_to_id(own)
        return token if token is not None else next(iter(self.stop), None)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those before and after it that the model was trained with."""
        return self.library.encode(text).ids

    def encode_all(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """`encode` of each text; without tokens around it unless `special`."""
        # Without places in the text, which would be most of the time and memory.
        encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=special)
        return [one.ids for one in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.library.decode([int(token) for token in tokens])

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the model answers.

        Args:
          messages: ``{"role": "user", "content": "..."}`` and so on.

        Raises:
          ValueError: the model has no chat template, or its template refuses the messages.
        """
        if self.template is None:
            raise ValueError("the model has no chat template; use encode, or an instructed model.")
        text = _render(self.template, messages, self.texts)
        return self.library.encode(text, add_special_tokens=False).ids


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (`folder_tokenizer`) or a GGUF file (`gguf_tokenizer`).

    Raises:
      WeightFileError: as those.
    """
    path = Path(path)
    return folder_tokenizer(path) if path.is_dir() else gguf_tokenizer(path)


def save_tokenizer(path: str | Path, tokenizer: Tokenizer) -> None:
    """Writes what `folder_tokenizer` reads: tokenizer.json, special tokens and chat template."""
    path = Path(path)
    tokenizer.library.save(str(path / "tokenizer.json"))
    settings = dict(tokenizer.texts)
    if tokenizer.template is not None:
        settings["chat_template"] = tokenizer.template
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (path / "tokenizer_config.json").write_text(text, encoding="utf-8")


def folder_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder as the hub has it.

    ``tokenizer.json``; the template from ``chat_template.jinja`` or ``tokenizer_config.json``; what
    ends an answer from ``generation_config.json`` or ``config.json``, and the tokenizer's own.

    Raises:
      WeightFileError: naming the file: not there or malformed; tokenizers is not installed.
    """
    path = Path(path)
    with reading(path / "tokenizer.json"):
        library = _library().Tokenizer.from_str((path / "tokenizer.json").read_text("utf-8"))
    settings = _json(path / "tokenizer_config.json")
    texts = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    template = settings.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text("utf-8")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    ends = _json(path / "generation_config.json").get("eos_token_id")
    ends = _json(path / "config.json").get("eos_token_id") if ends is None else ends
    stop = [ends] if isinstance(ends, int) else list(ends or ())
    own = library.token_to_id(texts["eos_token"]) if "eos_token" in texts else None
    if own is not None and own not in stop:
        stop.append(own)
    return Tokenizer(library, template, texts, tuple(stop))


def gguf_tokenizer(source: str | Path | Gguf) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata; of byte-level BPE as SmolLM2 splits texts.

    Raises:
      WeightFileError: naming the file: malformed, or of another kind, of which the metadata name
        the way texts are split and do not hold it; tokenizers is not installed.
    """
    file = source if isinstance(source, Gguf) else open_gguf(source)
    with reading(Path(file.name)):
        held = {
            key.removeprefix("tokenizer.ggml."): value
            for key, value in file.metadata.items()
            if key.startswith("tokenizer.ggml.")
        }
        kind = (held.get("model"), held.get("pre"))
        if kind != ("gpt2", "smollm"):
            raise Refusal(
                f"its tokenizer is {shown(repr(kind))}, expected ('gpt2', 'smollm')",
                "give the tokenizer.json of the model's folder",
            )
        tokens = held["tokens"]
        library = _byte_level(tokens, held["merges"], held["token_type"])
        names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id"}
        texts = {name: tokens[held[key]] for name, key in names.items() if key in held}
        stop = (held["eos_token_id"],) if "eos_token_id" in held else ()
        return Tokenizer(library, file.metadata.get("tokenizer.chat_template"), texts, stop)


def _byte_level(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int]) -> Any:
    """Byte-level BPE in which every digit is a token."""
    tk = _library()
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    library = tk.Tokenizer(tk.models.BPE(vocab=vocabulary, merges=pairs))
    library.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [
            tk.pre_tokenizers.Digits(individual_digits=True),
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.decoder = tk.decoders.ByteLevel()
    special = [
        tk.AddedToken(token, normalized=False, special=True)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == _CONTROL
    ]
    library.add_special_tokens(special)
    return library


def _render(template: str, messages: Sequence[Mapping[str, str]], texts: Mapping[str, str]) -> str:
    """A conversation as a template has it; it comes with weights, so that it runs in a sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse  # pyrefly: ignore[unsupported-operation]
    try:
        # No clock: a template that asks for the date gets none, and writes its own.
        made = environment.from_string(template)
        return made.render(messages=list(messages), add_generation_prompt=True, **texts)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the chat template does not take these messages: {shown(str(error), 300)}; give "
            "roles and contents as its model card says."
        ) from error


def _json(path: Path) -> Json:
    """A file's object; {} where it is not there."""
    if not path.is_file():
        return {}
    with reading(path):
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise Refusal("it holds no object")
        return content


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise Refusal("it needs the package tokenizers", "pip install jaximm[text]") from error
    return tokenizers
