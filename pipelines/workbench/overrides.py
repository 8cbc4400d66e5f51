"""Parameters that differ from params.yaml: checked as the file is, written into it with its comments kept."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.util import load_yaml_guess_indent

from pipelines.params import Params, UserError, checked, read_yaml

Overrides = dict[str, dict[str, Any]]


def of_keywords(section: str, keywords: Mapping[str, Any]) -> Overrides:
    """`learning_rate=3e-4` belongs to the stage's own section, `finetune={"steps": 20}` to the one that it names."""
    sections = {field.alias or name for name, field in Params.model_fields.items()}
    found: Overrides = {}
    for key, value in keywords.items():
        if key in sections and isinstance(value, Mapping):
            found.setdefault(key, {}).update(_plain(value))
        elif section in sections:
            found.setdefault(section, {})[key] = _plain(value)
        else:
            raise UserError(
                f"{section} has no section in params.yaml; name one, as in evaluate={{{key!r}: {value!r}}}."
            )
    return found


def of_words(section: str, words: Iterable[str]) -> Overrides:
    """`learning_rate=3e-4`, `finetune.steps=20` or `pretrain.model.hidden_size=64`; values are YAML."""
    found: Overrides = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--set takes key=value, not {word!r}; write for example --set learning_rate=3e-4.")
        path = key.strip().split(".")
        sections = {field.alias or name for name, field in Params.model_fields.items()}
        path = path if path[0] in sections else [section, *path]
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            raise UserError(f"{text!r} is not valid YAML; quote it, as in --set '{key}=\"...\"'.") from None
        if not path[1:] and not isinstance(value, Mapping):
            raise UserError(f"{path[0]} is a section of params.yaml; name a key of it, as in {path[0]}.KEY=VALUE.")
        for part in reversed(path[1:]):
            value = {part: value}
        _merge(found, {path[0]: value})
    return found


def keys(overrides: Overrides) -> list[str]:
    """`pretrain.learning_rate` of each override."""
    return [f"{section}.{key}" for section, values in overrides.items() for key in values]


def in_words(overrides: Overrides) -> str:
    """`learning_rate=0.0003, finetune.steps=20`, for a title."""
    return ", ".join(
        f"{section}.{key}={value}" for section, values in overrides.items() for key, value in values.items()
    )


def check(overrides: Overrides, path: Path) -> Params:
    """The parameters of the file with the overrides; raises `UserError` as for the file itself."""
    content = read_yaml(path)
    _merge(content, overrides)
    return checked(Params, content, Path(f"{path.name} with your overrides"))


def apply(overrides: Overrides, path: Path) -> str:
    """The text of the file with the overrides in it, everything else as it was, comments included."""
    text = path.read_text(encoding="utf-8")
    _, mapping, offset = load_yaml_guess_indent(text)
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=(mapping or 2), offset=offset or 0)
    content = yaml.load(text)
    _merge(content, overrides)
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def _merge(content: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(content.get(key), dict):
            _merge(content[key], value)
        elif isinstance(value, list) and isinstance(content.get(key), list):
            content[key][:] = value  # stays on one line where it was
        else:
            content[key] = value


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, tuples and mappings as YAML has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value
