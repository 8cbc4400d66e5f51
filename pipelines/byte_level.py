"""The byte behind each character of a byte-level vocabulary (GPT-2's table)."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel

_ALPHABET = sorted(ByteLevel.alphabet())  # one for each byte: itself where that can be printed, else from U+0100 on
_OTHERS = [byte for byte in range(256) if chr(byte) not in _ALPHABET]
BYTES = {character: (*range(256), *_OTHERS)[ord(character)] for character in _ALPHABET}
